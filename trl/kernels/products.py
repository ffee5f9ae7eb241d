"""Matrix products of linear layers, by the library that is the fastest on the processor at hand.

torch multiplies float32 matrices on CPUs with MKL, which reaches less than half of what a processor can do unless Intel made
it. oneDNN, which torch brings along for its other products, does not ask who made it (bench/products.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiplications of a product, from which on the other library gains more than the way to it costs.
_WORTHWHILE = 2**21
# Smaller weights than of so many columns and rows are not packed.
_LEAST_SIDE = 64
# What oneDNN calls what can follow a product: a name, scalars, and a kind.
ACTIVATIONS: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "silu": ("swish", [], ""),
    "gelu_tanh": ("gelu", [], "tanh"),
}
# Neither sharded nor quantised.
_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _processor() -> dict[str, Any]:
    """Its name, and what it has instructions for; empty where torch does not say."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


@cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's linear layers, as its own compiler calls them, for a processor that they are quick on."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    there = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return there and bool(_processor().get("avx2"))


@cache
def _has_bfloat16() -> bool:
    return bool(_processor().get("avx512_bf16") or _processor().get("amx_bf16"))


@cache
def _mkl_is_slow() -> bool:
    """Whether torch's own float32 products are MKL's, on a processor that this is not made for."""
    return torch.backends.mkl.is_available() and "AMD" in str(_processor().get("cpu_name"))


def can_be_packed(weight: Tensor) -> bool:
    """Whether `packed` can lay this weight `[out, in]` out anew."""
    if type(weight) not in _PLAIN or weight.device.type != "cpu" or min(weight.shape) < _LEAST_SIDE:
        return False
    fits = weight.dtype in (torch.float32, torch.bfloat16)
    return fits and _has_onednn() and (weight.dtype == torch.float32 or _has_bfloat16())


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of `weight` `[out, in]` in the order in which oneDNN reads it; for `packed_linear` alone.

    Args:
        weight: what `can_be_packed` said yes to.
        rows: how many rows will be multiplied by it at a time, about.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def packed_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    added: Tensor | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """`[..., in]` rows times a packed weight, plus `[out]` bias, and what follows before it is rounded; not differentiable.

    Args:
        rows: at least one.
        weight: from `packed`.
        bias: or None.
        activation: a name of `ACTIVATIONS`, of the result.
        added: `[..., out]`, added to the result; without `activation`.
        times: `[..., out]`, multiplied by the result; without either.
    """
    if added is not None or times is not None:
        other, name = (added, "add") if added is not None else (times, "mul")
        return torch.ops.mkldnn._linear_pointwise.binary(rows, other, weight, bias, name)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *ACTIVATIONS[activation])


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *ACTIVATIONS["none"])


def _is_worthwhile(rows: Tensor, weight: Tensor, bias: Tensor | None, multiplications: int) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(weight) in _PLAIN
        and rows.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and rows.device.type == weight.device.type == "cpu"
        and multiplications >= _WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
        and quicker_products()
    )


def shared_size(count: int, steps: int = 16) -> int:
    """`count` or a little more: of the numbers that are the same for many counts, `steps` between a power of two and the next.

    oneDNN writes code for every shape of a product, half a millisecond and up to a megabyte each, and keeps it for the
    next product of that shape (bench/products.py). Where shapes never repeat, that is a tenth of the time of a small model.
    """
    step = max(1, 2 ** (max(0, count - 1).bit_length()) // (2 * steps))
    return -(-count // step) * step


def quicker_products() -> bool:
    """Whether `linear` has another way than torch's on this processor."""
    return _mkl_is_slow() and _has_onednn()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """What `torch.nn.functional.linear` computes, to the rounding, and its gradients.

    Args:
        rows: `[..., in]`.
        weight: `[out, in]`, or `[in, out]` if `transposed`.
        bias: `[out]`.
        transposed: as in the layers of GPT-2.

    Returns:
        `[..., out]`.
    """
    if rows.numel() and _is_worthwhile(rows, weight, bias, rows.numel() // rows.shape[-1] * weight.numel()):
        return _Linear.apply(rows, weight, bias, transposed)
    return torch.nn.functional.linear(rows, weight.t() if transposed else weight, bias)


class LinearForward:
    """Stands in for the `forward` of a linear layer while passes are made.

    Args:
        layer: has `weight` and `bias`.
        transposed: whether the weight is `[in, out]`.
    """

    def __init__(self, layer: Any, *, transposed: bool) -> None:
        self.layer = layer
        self.transposed = transposed

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (rows,) = (*args, *kwargs.values())  # the argument's name is the layer's own
        return linear(rows, self.layer.weight, self.layer.bias, transposed=self.transposed)


class _Linear(torch.autograd.Function):
    """[..., I] rows, [O, I] or [I, O] weight, [O] bias -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if wants_weight else None, weight if wants_rows else None)
        ctx.transposed, ctx.shape = transposed, rows.shape
        return _onednn(rows, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        wide = grad.reshape(-1, grad.shape[-1])
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_rows = (
            _onednn(wide, weight if ctx.transposed else weight.t(), None).view(ctx.shape) if wants_rows else None
        )
        grad_weight = grad_bias = None
        if wants_weight:
            flat = rows.reshape(-1, rows.shape[-1])
            grad_weight = summed_outer(flat, wide) if ctx.transposed else summed_outer(wide, flat)
        if wants_bias:
            grad_bias = wide.sum(dim=0)
        return grad_rows, grad_weight, grad_bias, None


def summed_outer(first: Tensor, second: Tensor) -> Tensor:
    """`[M, p]` and `[M, q]` -> `[p, q]`, the sum of the outer products of their rows; not differentiable."""
    count, p = first.shape
    q = second.shape[1]
    if not _is_worthwhile(first, second, None, count * p * q):
        return first.t() @ second
    # oneDNN reads the one of them row by row after a copy; or the other, and then the result has to be turned.
    if p * count <= q * count + p * q:
        return _onednn(first.t().contiguous(), second.t(), None)
    return _onednn(second.t().contiguous(), first.t(), None).t().contiguous()
