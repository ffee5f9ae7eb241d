"""Weights laid out for decoding: as oneDNN reads them, once per batch of responses in place of once per token.

A product of few rows takes as long as it takes to read the weights, and torch's own order is read at half the speed
(bench/products.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.functional.products import LinearForward, can_be_packed, packed, packed_linear

# Fewer tokens are not worth a copy of the weights.
LEAST_TOKENS = 12


def _forward(weight: Tensor, bias: Tensor | None, plain: Any, rows: Tensor) -> Tensor:
    return packed_linear(rows, weight, bias) if rows.dtype == weight.dtype and rows.numel() else plain(rows)


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
    try:
        for module in model.modules() if tokens >= LEAST_TOKENS else ():
            own = module.__dict__.get("forward")
            if type(module) not in (nn.Linear, Conv1D) or not isinstance(own, LinearForward | None):
                continue
            layer: Any = module
            weight = layer.weight.detach() if type(layer.weight) is nn.Parameter else layer.weight
            weight = weight.t() if type(layer) is Conv1D else weight
            if can_be_packed(weight):
                bias = None if layer.bias is None else layer.bias.detach()
                forward = partial(_forward, packed(weight, rows), bias, layer.forward)
                before[module] = own
                module.forward = forward
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own
