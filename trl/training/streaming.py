"""Adam on bfloat16 gradients of float32 weights, a piece at a time: everything is read from memory and written once.

Each piece is small enough to stay in the processor's cache while its gradient is widened, Adam's own kernel is applied, and
the weights are narrowed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW
from torch.optim.adam import adam

# Elements of a piece. A multiple of every vector width, so that pieces round as the whole does.
_CACHED, _LAUNCHED = 2**18, 2**24


def can_stream(optimizer: Any) -> bool:
    """Whether `adam_step` does what a torch optimizer would: Adam or AdamW itself, with nothing out of the ordinary."""
    unusual = ("amsgrad", "maximize", "capturable", "differentiable", "foreach")
    return type(optimizer) in (Adam, AdamW) and not any(
        group["fused"] is False or any(group[name] for name in unusual) for group in optimizer.param_groups
    )


def total_norm(narrow: Iterable[Tensor], wide: Iterable[Tensor]) -> Tensor:
    """Scalar float32: the norm of gradients of any dtype together, with no widened copy of any but a piece."""
    norms = [torch.linalg.vector_norm(piece.float()) for tensor in narrow for (piece,) in _pieces(tensor)]
    norms += [torch.linalg.vector_norm(tensor.float()) for tensor in wide]
    if not norms:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


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
                _step(parameter, gradients[parameter], _state(optimizer, parameter, group), group, scale)
                stepped.append(parameter)
    return stepped


def _state(optimizer: Adam, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state; made as torch makes it, if there is none yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        wide = torch.float64 if torch.get_default_dtype() == torch.float64 and not group["fused"] else torch.float32
        state["step"] = torch.zeros((), dtype=wide, device=parameter.device if group["fused"] else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _step(
    parameter: Tensor, narrow: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any], scale: float
) -> None:
    beta1, beta2 = group["betas"]
    for weights, average, square, gradient in _pieces(
        parameter.detach(), state["exp_avg"], state["exp_avg_sq"], narrow
    ):
        wide = gradient.float()
        if scale != 1.0:
            wide.mul_(scale)
        adam(
            [weights],
            [wide],
            [average],
            [square],
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
        gradient.copy_(weights)
    state["step"].add_(1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same flat piece of each of some tensors of one shape; they themselves, if their numbers do not lie in order."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    size = _CACHED if tensors[0].device.type == "cpu" else _LAUNCHED
    yield from zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True)
