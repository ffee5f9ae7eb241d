"""RMSNorm as one operation on GPUs.

Replaces the `forward` of a model's RMSNorm modules during passes: transformers computes them in eight operations, each
of which reads and writes the hidden states, and launches a kernel while tokens are decoded. Gain: one
kernel instead of eight, twice a layer; its share of a pass has not been measured. Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.kernels.door import kernels_enabled, replaced_forwards

_FORWARDS: WeakKeyDictionary[nn.Module, dict[nn.Module, Callable[[Tensor], Tensor]]] = WeakKeyDictionary()


@contextmanager
def fused_norms(*models: nn.Module) -> Iterator[None]:
    """Replaces the forward of the models' plain RMSNorm modules inside the `with` block."""
    forwards: dict[Any, Callable[..., Any]] = {}
    for model in models if kernels_enabled() else ():
        if model not in _FORWARDS:
            _FORWARDS[model] = {m: _fused(m) for m in model.modules() if is_plain_rms_norm(m)}
        forwards |= {m: f for m, f in _FORWARDS[model].items() if "forward" not in vars(m) and not _is_hooked(m)}
    with replaced_forwards(forwards):
        yield


def is_plain_rms_norm(module: nn.Module) -> bool:
    """Whether a module computes weight · x / rms(x), which is tried out, with nothing more to it."""
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() != 1 or _eps(module) is None or _is_hooked(module):
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    x, other = (torch.randn(shape, generator=generator, device="cpu") for shape in ((3, len(weight)), (len(weight),)))
    x[0] *= 1e-3  # where eps shows
    x, other = x.to(weight.device), other.to(weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            own = torch.func.functional_call(module, {"weight": other}, (x,))
        except (RuntimeError, TypeError, ValueError):
            return False
        return isinstance(own, Tensor) and torch.allclose(
            own, F.rms_norm(x, other.shape, other, _eps(module)), atol=1e-5
        )


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return eps if isinstance(eps, float) else None


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    plain, eps = module.forward, _eps(module)

    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.dtype != hidden_states.dtype:
            result: Tensor = plain(hidden_states)
            return result
        return F.rms_norm(hidden_states, weight.shape, weight, eps)

    return forward
