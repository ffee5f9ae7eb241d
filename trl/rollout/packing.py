"""Weights laid out for decoding: as oneDNN reads them, once per batch of responses in place of once per token.

A product of few rows takes as long as it takes to read the weights, and torch's own order is read at half the speed
(bench/products.py). What a LoRA adapter reads first is packed with the weight that it stands on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.functional.products import LinearForward, can_be_packed, packed, packed_linear

# Fewer tokens are not worth a copy of the weights.
LEAST_TOKENS = 12


class _PackedLinear:
    """Stands in for the `forward` of a linear layer, on a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, plain: Callable[..., Tensor], rows: int) -> None:
        self.weight = packed(weight, rows)
        self.dtype = weight.dtype
        self.bias = bias
        self.plain = plain

    def __call__(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if rows.dtype != self.dtype or not rows.numel() or args or kwargs:
            return self.plain(rows, *args, **kwargs)
        return packed_linear(rows, self.weight, self.bias)


class _PackedAdapter(_PackedLinear):
    """The same for a LoRA layer: one product with the weight and with what the adapter reads."""

    def __init__(self, base: nn.Linear, low: Tensor, up: Tensor, plain: Callable[..., Tensor], rows: int) -> None:
        bias = None if base.bias is None else nn.functional.pad(base.bias.detach(), (0, len(low)))
        super().__init__(torch.cat([base.weight.detach(), low.detach()]), bias, plain, rows)
        self.outside = base.out_features
        self.up = up.t()  # [r, out]

    def __call__(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if rows.dtype != self.dtype or not rows.numel() or args or kwargs:
            return self.plain(rows, *args, **kwargs)
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
    if len({layer.weight.dtype for layer in layers}) > 1 or any("forward" in vars(layer) for layer in (low, up)):
        return None
    return low.weight.detach(), up.weight.detach() * module.scaling[name]


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, tokens: int) -> Iterator[None]:
    """Within, the linear layers of `model` read copies of their weights that are laid out for decoding; not differentiable.

    Where torch cannot do so, or for too few tokens, nothing is done. The copies take the memory of the weights once more.

    Args:
        model: a plain transformers language model, or one with adapters, whose weights nobody changes meanwhile.
        rows: about how many rows are decoded at a time.
        tokens: about how many forward passes will be made.
    """
    before: dict[Any, LinearForward | None] = {}

    def put(module: Any, forward: _PackedLinear) -> None:
        before[module] = vars(module).get("forward")
        module.forward = forward

    done: set[nn.Module] = set()  # under an adapter
    try:
        for module in model.modules() if tokens >= LEAST_TOKENS else ():
            layer: Any = module
            if layer in done or not _replaceable(layer):
                continue
            adapter = _adapter(layer)
            if (
                adapter is not None
                and _replaceable(layer.base_layer)
                and can_be_packed(layer.base_layer.weight.detach())
            ):
                put(layer, _PackedAdapter(layer.base_layer, *adapter, layer.forward, rows))
                done.add(layer.base_layer)
            elif type(layer) in (nn.Linear, Conv1D) and type(layer.weight) is nn.Parameter:
                weight = layer.weight.detach().t() if type(layer) is Conv1D else layer.weight.detach()
                if can_be_packed(weight):
                    bias = None if layer.bias is None else layer.bias.detach()
                    put(layer, _PackedLinear(weight, bias, layer.forward, rows))
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _replaceable(layer: Any) -> bool:
    """Whether nobody else stands in for its `forward`."""
    return isinstance(vars(layer).get("forward"), LinearForward | None)
