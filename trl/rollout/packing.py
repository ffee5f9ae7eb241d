"""Weights laid out for decoding: as oneDNN reads them, once per batch of responses in place of once per token.

A product of few rows takes as long as it takes to read the weights, and torch's own order is read more slowly
(bench/products.py). What a LoRA adapter reads first is packed with the weight that it stands on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.functional.products import LinearForward, can_be_packed, packed, packed_linear

logger = logging.getLogger(__name__)

# Fewer tokens are not worth a copy of the weights.
LEAST_TOKENS = 12
# The copies may take this share of the machine's memory. Not of what is free at the moment: a run that is resumed computes as
# it did before.
_SHARE = 1 / 8


class _PackedLinear:
    """Stands in for the `forward` of a linear layer, on a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: Callable[..., Tensor], rows: int) -> None:
        self.weight = packed(weight, rows)
        self.dtype = weight.dtype
        self.bias = bias
        self.plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].dtype != self.dtype or not args[0].numel():
            return self.plain(*args, **kwargs)
        return self.product(args[0])

    def product(self, rows: Tensor) -> Tensor:
        """`[..., in]` rows, at least one, to `[..., out]`."""
        return packed_linear(rows, self.weight, self.bias)


class _PackedAdapter(_PackedLinear):
    """The same for a LoRA layer: one product with the weight and with what the adapter reads."""

    def __init__(self, base: nn.Linear, low: Tensor, up: Tensor, plain: Callable[..., Tensor], rows: int) -> None:
        bias = None if base.bias is None else nn.functional.pad(base.bias.detach(), (0, len(low)))
        super().__init__(torch.cat([base.weight.detach(), low.detach()]), bias, plain, rows)
        self.outside = base.out_features
        self.up = up.t()  # [r, out]

    def product(self, rows: Tensor) -> Tensor:
        both = packed_linear(rows, self.weight, self.bias).flatten(0, -2)
        found = torch.addmm(both[:, : self.outside], both[:, self.outside :], self.up)
        return found.view(*rows.shape[:-1], self.outside)


def _adapter(module: Any) -> tuple[Tensor, Tensor] | None:
    """What a plain LoRA layer multiplies by, one after the other: `[r, in]`, and `[out, r]` with its scale; None for others."""
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora."):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(names) != 1:
        return None
    (name,) = names
    low, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    layers = (module.base_layer, low, up)
    if any(type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter for layer in layers):
        return None
    if (
        low.bias is not None
        or up.bias is not None
        or name in module.lora_variant
        or (dropout.training and getattr(dropout, "p", 0))
    ):
        return None
    if len({layer.weight.dtype for layer in layers}) > 1 or not all(_is_free(layer) for layer in (low, up)):
        return None
    return low.weight.detach(), up.weight.detach() * module.scaling[name]


@cache
def _memory() -> int | None:
    """Bytes for this process: the machine's or its control group's, over the processes that share them; None if unknown."""
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        return None
    for path in _limits():
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))


def _limits() -> Iterator[Path]:
    """Files that may hold a limit of this process's control groups, version 2 or 1."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, names, path = line.split(":", 2)
        folder = Path(path.lstrip("/"))
        if number == "0":
            yield from (root / above / "memory.max" for above in (folder, *folder.parents))
        elif "memory" in names.split(","):
            yield from (root / "memory" / above / "memory.limit_in_bytes" for above in (folder, *folder.parents))


@cache
def _log_too_large(needed: int, memory: int | None) -> None:
    known = "whose size is unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    logger.info(
        "weights are not packed for decoding: copies of %.1f GB are more than an eighth of the memory, %s",
        needed / 1e9,
        known,
    )


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, tokens: int) -> Iterator[None]:
    """Within, the linear layers of `model` read copies of their weights that are laid out for decoding; not differentiable.

    Where torch cannot do so, for too few tokens, or where the copies would fill more than an eighth of the machine's memory,
    nothing is done.

    Args:
        model: a plain transformers language model, or one with adapters, whose weights nobody changes meanwhile.
        rows: about how many rows are decoded at a time.
        tokens: about how many forward passes will be made.
    """
    layers: list[Any] = []
    if tokens >= LEAST_TOKENS and not torch.is_autocast_enabled("cpu"):  # which would narrow the weights in every pass
        layers = [layer for layer in model.modules() if _is_packable(layer)]
    needed = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    memory = _memory()
    if layers and (memory is None or needed > _SHARE * memory):
        _log_too_large(needed, memory)
        layers = []
    wanted = set(layers)
    adapters: list[Any] = (
        [module for module in model.modules() if getattr(module, "base_layer", None) in wanted] if wanted else []
    )
    before: dict[Any, LinearForward | None] = {}

    def put(module: Any, forward: _PackedLinear) -> None:
        before[module] = vars(module).get("forward")
        module.forward = forward

    try:
        for module in adapters:
            found = _adapter(module) if _is_free(module) else None
            if found is not None:
                put(module, _PackedAdapter(module.base_layer, *found, module.forward, rows))
                wanted.discard(module.base_layer)
        for layer in layers:
            if layer in wanted:
                bias = None if layer.bias is None else layer.bias.detach()
                put(layer, _PackedLinear(_weight(layer), bias, layer.forward, rows))
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _weight(layer: Any) -> Tensor:
    """`[out, in]`."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if type(layer) is Conv1D else weight


def _is_packable(layer: Any) -> bool:
    plain = type(layer) in (nn.Linear, Conv1D) and type(layer.weight) is nn.Parameter
    return plain and _is_free(layer) and can_be_packed(_weight(layer))


def _is_free(layer: Any) -> bool:
    """Whether nobody else stands in for its `forward`, nor waits for it to be called."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and isinstance(vars(layer).get("forward"), LinearForward | None)
