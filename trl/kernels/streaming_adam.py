"""Chunked Adam for float32 weights with bfloat16 gradients, which reads and writes memory only once.

Replaces torch's Adam step on float32 gradients after bfloat16 passes: each chunk stays in the processor's cache while
its gradient is cast to float32, torch's Adam kernel is applied and the weights are cast back to bfloat16. Gain for 135M
parameters: 540 MB of gradients, and on two cores of a Zen 4 EPYC 34 instead of 41 ms for their norm
(`python bench/compare.py --job main`, docs/performance.md); on an Intel Xeon with AMX it costs a twentieth of a cycle
(`python bench/each_kernel.py`). On a GPU, where every operation on a small tensor costs a launch, norm and step run
over many parameters at once (`python bench/gpu/micro.py`). Off with `TRL_KERNELS=off`, but for `NarrowAdam`, whose
bfloat16 moments are a setting (`PPOConfig.optimizer_state_dtype`) and have no counterpart in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW

from trl.kernels.door import kernels_enabled

_DOT_SIZE = 2**18  # elements per dot product
# Elements per chunk. A multiple of every vector width, so that chunks round as the whole tensor does.
_CPU_CHUNK, _GPU_CHUNK = 2**19, 2**24
_GPU_GROUP = 2**26  # elements whose gradients are in float32 at the same time in a GPU's step over many parameters


class NarrowAdam(Adam):
    """Adam with bfloat16 moments: 4 bytes per parameter instead of 8.

    A step moves the second moment by a thousandth of the new squared gradient, less than bfloat16's spacing, so
    rounding to nearest would leave it stuck. Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551) makes it right
    on average; its random numbers depend only on the step count, so a resumed run continues identically.

    Args:
        parameters: float32 parameters; for other dtypes the moments are as in Adam.
        settings: arguments of `torch.optim.Adam`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs `closure`, if given, then takes one step; returns the closure's result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if hasattr(parameter, "device_mesh"):
                    raise ValueError("optimizer_state_dtype='bfloat16' does not support sharded weights")
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, _state(self, parameter, group), group)
        return result

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads the state and casts the moments back to bfloat16, because torch casts them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(_moment_dtype(self, parameter))


def _moment_dtype(optimizer: Adam, parameter: Tensor) -> torch.dtype:
    narrow = isinstance(optimizer, NarrowAdam) and parameter.dtype == torch.float32
    return torch.bfloat16 if narrow else parameter.dtype


def can_stream(optimizer: Any) -> bool:
    """Whether `adam_step` can replace the optimizer's step: Adam, AdamW or `NarrowAdam`, without unusual options."""
    if not kernels_enabled():
        return False
    unusual = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
    return type(optimizer) in (Adam, AdamW, NarrowAdam) and not any(
        group["fused"] is False or any(group[name] for name in unusual) for group in optimizer.param_groups
    )


def total_norm(narrow: Iterable[Tensor], wide: Iterable[Tensor]) -> Tensor:
    """Returns the total norm of gradients of any dtypes, a float32 scalar; casts one chunk at a time to float32."""
    tensors = [tensor.detach() for tensor in (*narrow, *wide)]
    if tensors and all(tensor.is_cuda for tensor in tensors):
        by_kind: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        norms = [norm for kind in by_kind.values() for norm in torch._foreach_norm(kind, 2, dtype=torch.float32)]
        return torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
    squares = [_square(piece) for tensor in tensors for (piece,) in _pieces(tensor)]
    if not squares:
        return torch.zeros(())
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _square(tensor: Tensor) -> Tensor:
    """Returns the squared norm, a float32 scalar, by dot products: half the time of torch's norm, and more accurate."""
    parts = (part.float() for part in tensor.flatten().split(_DOT_SIZE))
    return torch.stack([torch.dot(part, part) for part in parts]).sum()


@torch.no_grad()
def adam_step(optimizer: Adam, gradients: Mapping[Tensor, Tensor], scale: float = 1.0) -> list[Tensor]:
    """Takes a fused Adam step with bfloat16 gradients, creating optimizer state where there is none.

    Args:
        optimizer: an optimizer for which `can_stream` is True.
        gradients: gradient of each parameter, with the parameter's memory layout; overwritten with the updated
            parameter in the gradient's dtype.
        scale: factor applied to the gradients after the cast to float32.

    Returns:
        The parameters that were updated; `gradients` may hold some that the optimizer does not.
    """
    updated = []
    for group in optimizer.param_groups:
        rest = []
        for parameter in group["params"]:
            if parameter in gradients:
                state = _state(optimizer, parameter, group)
                if parameter.is_cuda and state["exp_avg"].dtype == parameter.dtype and group["fused"]:
                    rest.append((parameter, gradients[parameter], state))
                else:
                    _step(parameter, gradients[parameter], state, group, scale, write_back=True)
                updated.append(parameter)
        for batch in _batches(rest):
            _step_together(batch, group, scale)
    return updated


Update = tuple[Tensor, Tensor, dict[str, Tensor]]  # a parameter, its gradient, its optimizer state


def _batches(updates: Sequence[Update]) -> Iterator[list[Update]]:
    """Yields groups of updates of one device and dtype, with at most `_GPU_GROUP` elements or one parameter."""
    by_kind: dict[Any, list[Update]] = {}
    for update in updates:
        by_kind.setdefault((update[0].device, update[0].dtype, update[1].dtype), []).append(update)
    for kind in by_kind.values():
        batch: list[Update] = []
        size = 0
        for update in kind:
            if batch and size + update[0].numel() > _GPU_GROUP:
                yield batch
                batch, size = [], 0
            batch.append(update)
            size += update[0].numel()
        yield batch


def _step_together(updates: Sequence[Update], group: Mapping[str, Any], scale: float) -> None:
    """Updates many parameters with one kernel per operation, and overwrites their gradients with the new weights."""
    parameters, gradients, states = (list(column) for column in zip(*updates, strict=True))
    parameters = [parameter.detach() for parameter in parameters]
    wide = [torch.empty_like(parameter) for parameter in parameters]
    torch._foreach_copy_(wide, gradients)
    if scale != 1.0:
        torch._foreach_mul_(wide, scale)
    counts = [state["step"] for state in states]
    torch._foreach_add_(counts, 1)
    update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    update(
        parameters,
        wide,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        counts,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
    torch._foreach_copy_(gradients, parameters)


def _state(optimizer: Adam, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns a parameter's optimizer state, initialised as torch does if missing."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        wide = torch.float64 if torch.get_default_dtype() == torch.float64 and not group["fused"] else torch.float32
        state["step"] = torch.zeros((), dtype=wide, device=parameter.device if group["fused"] else "cpu")
        for name in ("exp_avg", "exp_avg_sq"):
            dtype = _moment_dtype(optimizer, parameter)
            state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return state


def _step(
    parameter: Tensor,
    gradient: Tensor,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    scale: float = 1.0,
    *,
    write_back: bool = False,
) -> None:
    """Updates one parameter; `write_back` overwrites its gradient with the updated weights."""
    beta1, beta2 = group["betas"]
    narrow = state["exp_avg"].dtype != parameter.dtype
    seed = int(state["step"]) if narrow else 0
    # The operation itself: torch's functional Adam spends a twentieth of a step on sorting one tensor.
    update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    count = state["step"].to(parameter.device, torch.float32) + 1
    for weights, average, square, grad_chunk in _pieces(
        parameter.detach(), state["exp_avg"], state["exp_avg_sq"], gradient
    ):
        wide = grad_chunk.to(weights.dtype)
        if scale != 1.0:
            wide.mul_(scale)
        moments = (average.to(weights.dtype), square.to(weights.dtype)) if narrow else (average, square)
        update(
            [weights],
            [wide],
            [moments[0]],
            [moments[1]],
            [],
            [count],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if narrow:
            average.copy_(moments[0])
            square.copy_(_rounded_at_random(moments[1], seed))
        if write_back:
            grad_chunk.copy_(weights)
    state["step"].add_(1)


def _rounded_at_random(x: Tensor, seed: int) -> Tensor:
    """Rounds float32 to bfloat16 precision in place, away from zero with a probability of the truncated fraction."""
    size = max(x.numel(), _CPU_CHUNK if x.device.type == "cpu" else _GPU_CHUNK)
    noise = _noise(size, seed, x.device)[: x.numel()].view(x.shape)
    x.view(torch.int32).add_(noise).bitwise_and_(-(2**16))  # bfloat16 drops the lower 16 bits of a float32
    return x


@lru_cache(maxsize=1)
def _noise(size: int, seed: int, device: torch.device) -> Tensor:
    """Returns random int32 `[size]` in [0, 2^16), the same for every chunk of a step."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(2**16, (size,), dtype=torch.int32, device=device, generator=generator)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields matching flat chunks of equally shaped tensors; yields them whole if any is not contiguous."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = _CPU_CHUNK if tensors[0].device.type == "cpu" else _GPU_CHUNK
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
