"""Adam on bfloat16 gradients of float32 weights, a piece at a time: everything is read from memory and written once.

Each piece is small enough to stay in the processor's cache while its gradient is widened, Adam's own kernel is applied, and
the weights are narrowed again. Adam's moments can be held in bfloat16 as well (`NarrowAdam`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.adam import adam

_DOT = 2**18  # elements of a dot product
# Elements of a piece. A multiple of every vector width, so that pieces round as the whole does.
_CACHED, _LAUNCHED = 2**19, 2**24


class NarrowAdam(Adam):
    """Adam whose moments are held in bfloat16: 4 bytes a parameter in place of 8.

    A step moves the second moment by a thousandth of what is new, less than bfloat16 numbers are apart: rounded to the nearest,
    it would stay where it is. It is rounded up or down at random, so that it is right on average (stochastic rounding, Gupta et al.
    2015, arXiv:1502.02551); the numbers depend on the count of steps alone, so that a run that is resumed goes on as it would have.

    Args:
        parameters: float32 ones; moments of others are as Adam's.
        settings: of `torch.optim.Adam`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that parameters have once `closure` has run."""
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if hasattr(parameter, "device_mesh"):
                    raise ValueError(
                        "optimizer_state_dtype='bfloat16' is not for weights that are spread over processes"
                    )
                if parameter.grad is not None:
                    _step(parameter, parameter.grad, _state(self, parameter, group), group)
        return found

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which widens moments on the way."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(_moment_dtype(self, parameter))


def _moment_dtype(optimizer: Adam, parameter: Tensor) -> torch.dtype:
    narrow = isinstance(optimizer, NarrowAdam) and parameter.dtype == torch.float32
    return torch.bfloat16 if narrow else parameter.dtype


def can_stream(optimizer: Any) -> bool:
    """Whether `adam_step` does what a torch optimizer would: Adam or AdamW itself, with nothing out of the ordinary."""
    unusual = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
    return type(optimizer) in (Adam, AdamW, NarrowAdam) and not any(
        group["fused"] is False or any(group[name] for name in unusual) for group in optimizer.param_groups
    )


def total_norm(narrow: Iterable[Tensor], wide: Iterable[Tensor]) -> Tensor:
    """Scalar float32: the norm of gradients of any dtype together, with no widened copy of any but a piece."""
    squares = [_square(piece) for tensor in (*narrow, *wide) for (piece,) in _pieces(tensor.detach())]
    if not squares:
        return torch.zeros(())
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _square(tensor: Tensor) -> Tensor:
    """Scalar float32: the squared norm. A dot product takes half the time of torch's norm, and is nearer to the exact one."""
    parts = (part.float() for part in tensor.flatten().split(_DOT))
    return torch.stack([torch.dot(part, part) for part in parts]).sum()


@torch.no_grad()
def adam_step(optimizer: Adam, gradients: Mapping[Tensor, Tensor], scale: float = 1.0) -> list[Tensor]:
    """The step of fused Adam with narrow gradients, on the state that the optimizer has or would have made.

    Args:
        optimizer: one that `can_stream`.
        gradients: by parameter of any shape, contiguous as it is. On return the parameter stands there, narrowed.
        scale: what the gradients are multiplied by, once they are wide.

    Returns:
        The parameters that were stepped: the optimizer may not have all of them.
    """
    stepped = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in gradients:
                state = _state(optimizer, parameter, group)
                _step(parameter, gradients[parameter], state, group, scale, narrows=True)
                stepped.append(parameter)
    return stepped


def _state(optimizer: Adam, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state; made as torch makes it, if there is none yet."""
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
    narrows: bool = False,
) -> None:
    """One step of one parameter, which `narrows` writes to where its gradient was."""
    beta1, beta2 = group["betas"]
    narrow = state["exp_avg"].dtype != parameter.dtype
    seed = int(state["step"]) if narrow else 0
    for weights, average, square, slope in _pieces(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], gradient):
        wide = slope.to(weights.dtype)
        if scale != 1.0:
            wide.mul_(scale)
        moments = (average.to(weights.dtype), square.to(weights.dtype)) if narrow else (average, square)
        adam(
            [weights],
            [wide],
            [moments[0]],
            [moments[1]],
            [],
            [state["step"].to(weights.device, torch.float32, copy=True)],  # each piece counts the step by itself
            fused=True,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if narrow:
            average.copy_(moments[0])
            square.copy_(_rounded_at_random(moments[1], seed))
        if narrows:
            slope.copy_(weights)
    state["step"].add_(1)


def _rounded_at_random(x: Tensor, seed: int) -> Tensor:
    """Float32 numbers, cut to what bfloat16 holds, or the next larger in magnitude: as likely as they are near to it. In place."""
    size = max(x.numel(), _CACHED if x.device.type == "cpu" else _LAUNCHED)
    noise = _noise(size, seed, x.device)[: x.numel()].view(x.shape)
    x.view(torch.int32).add_(noise).bitwise_and_(
        -(2**16)
    )  # the lower half of a float32 is what bfloat16 has no bits for
    return x


@lru_cache(maxsize=1)
def _noise(size: int, seed: int, device: torch.device) -> Tensor:
    """`[size]` int32 below 2^16, the same for every piece of a step."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(2**16, (size,), dtype=torch.int32, device=device, generator=generator)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same flat piece of each of some tensors of one shape; they themselves, if their numbers do not lie in order."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = _CACHED if tensors[0].device.type == "cpu" else _LAUNCHED
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
