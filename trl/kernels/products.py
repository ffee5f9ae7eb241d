"""Matrix products by oneDNN, which ships with torch: float32 products on AMD processors, and packed weights.

`linear` replaces `torch.nn.functional.linear` in the models' layers (`trl.kernels.linear`) and in
`trl.kernels.projection`. On CPUs torch multiplies float32 matrices with MKL, which reaches less than half of the peak
on processors not made by Intel; oneDNN has no such penalty. Gain on two cores of a Zen 5 EPYC: 1.3 to 2.3 times the
float32 products per second from 16 rows, none in bfloat16. `bucket_size` saves 0.2 to 0.5 ms and up to 1.3 MB for each
product shape that would not repeat (`python bench/products.py`). Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trl.kernels.door import kernels_enabled

# Minimum number of multiplies at which oneDNN repays its dispatch cost.
_WORTHWHILE = 2**21
# Minimum number of rows and of columns of a weight to pack.
_MIN_SIDE = 64
# Exact tensor types that are neither sharded nor quantised.
_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def processor() -> dict[str, Any]:
    """Returns the CPU's name and instruction set flags; empty if torch does not report them."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


@cache
def _has_onednn() -> bool:
    """Whether torch has the oneDNN linear ops that its compiler uses, and the CPU has AVX2, which makes them fast."""
    names = ("_linear_pointwise", "_reorder_linear_weight")
    available = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return available and bool(processor().get("avx2"))


@cache
def has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions; False where torch does not report them (torch 2.10)."""
    return bool(processor().get("avx512_bf16") or processor().get("amx_bf16"))


@cache
def _mkl_is_slow() -> bool:
    """Whether torch uses MKL for float32 products on an AMD processor, where it is slow."""
    return torch.backends.mkl.is_available() and "AMD" in str(processor().get("cpu_name"))


def can_be_packed(weight: Tensor) -> bool:
    """Whether `packed` supports this weight `[out, in]`."""
    if type(weight) not in _PLAIN or weight.device.type != "cpu" or min(weight.shape) < _MIN_SIDE:
        return False
    supported = weight.dtype in (torch.float32, torch.bfloat16)
    return supported and _has_onednn() and (weight.dtype == torch.float32 or has_bfloat16())


def packed(weight: Tensor, rows: int) -> Tensor:
    """Copies `weight` `[out, in]` into oneDNN's blocked layout; only `packed_linear` can read the result.

    Args:
        weight: a weight for which `can_be_packed` is True.
        rows: approximate number of rows per product.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)


def packed_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer on a weight from `packed`, `[..., in]` to `[..., out]`, at least one row; not differentiable."""
    return _onednn(rows, weight, bias)


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _is_worthwhile(rows: Tensor, weight: Tensor, bias: Tensor | None, multiplications: int) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(weight) in _PLAIN
        and rows.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and rows.device.type == weight.device.type == "cpu"
        and multiplications >= _WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    )


def bucket_size(count: int, steps: int = 16) -> int:
    """Rounds `count` up to one of `steps` bucket sizes per power of two, so that shapes repeat.

    oneDNN generates and caches code for every product shape, at half a millisecond and up to a megabyte each
    (bench/products.py). If shapes never repeat, that is a tenth of a small model's time. With kernels off, `count`.
    """
    if not kernels_enabled():
        return count
    step = max(1, 2 ** (max(0, count - 1).bit_length()) // (2 * steps))
    return -(-count // step) * step


def prefers_onednn() -> bool:
    """Whether `linear` multiplies by oneDNN on this CPU because torch's own product is slower."""
    return kernels_enabled() and _mkl_is_slow() and _has_onednn()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """Same as `torch.nn.functional.linear` up to rounding, with gradients.

    Args:
        rows: `[..., in]`.
        weight: `[out, in]`, or `[in, out]` if `transposed`.
        bias: `[out]`.
        transposed: whether the weight is stored as in GPT-2's layers.

    Returns:
        `[..., out]`.
    """
    if rows.numel() and _is_worthwhile(rows, weight, bias, rows.numel() // rows.shape[-1] * weight.numel()):
        return _Linear.apply(rows, weight, bias, transposed)
    return torch.nn.functional.linear(rows, weight.t() if transposed else weight, bias)


class LinearForward:
    """Temporary replacement for a linear layer's `forward` that calls `linear`.

    Args:
        layer: a module with `weight` and `bias`.
        transposed: whether the weight is `[in, out]`.
    """

    def __init__(self, layer: Any, *, transposed: bool) -> None:
        self.layer = layer
        self.transposed = transposed

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (rows,) = (*args, *kwargs.values())  # the argument's name depends on the layer
        return linear(rows, self.layer.weight, self.layer.bias, transposed=self.transposed)


class _Linear(torch.autograd.Function):
    """[..., I] rows, [O, I] or [I, O] weight, [O] bias -> [..., O]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        needs_rows, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if needs_weight else None, weight if needs_rows else None)
        ctx.transposed, ctx.shape = transposed, rows.shape
        return _onednn(rows, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, weight = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_rows = (
            _onednn(flat_grad, weight if ctx.transposed else weight.t(), None).view(ctx.shape) if needs_rows else None
        )
        grad_weight = grad_bias = None
        if needs_weight:
            flat_rows = rows.reshape(-1, rows.shape[-1])
            grad_weight = summed_outer(flat_rows, flat_grad) if ctx.transposed else summed_outer(flat_grad, flat_rows)
        if needs_bias:
            grad_bias = flat_grad.sum(dim=0)
        return grad_rows, grad_weight, grad_bias, None


def summed_outer(first: Tensor, second: Tensor) -> Tensor:
    """Sums the outer products of rows, `[M, p]` and `[M, q]` to `[p, q]`; not differentiable."""
    count, p = first.shape
    q = second.shape[1]
    if not _is_worthwhile(first, second, None, count * p * q):
        return first.t() @ second
    # oneDNN needs a contiguous copy of one operand: of `first`, or of `second` and then the result must be transposed.
    if p * count <= q * count + p * q:
        return _onednn(first.t().contiguous(), second.t(), None)
    return _onednn(second.t().contiguous(), first.t(), None).t().contiguous()
