"""Temporarily routes a model's linear layers to the fastest matrix product, without modifying the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.products import LinearForward, quicker_products


@contextmanager
def quick_products(*models: nn.Module) -> Iterator[None]:
    """Makes the linear layers of `models` use `trl.kernels.products.linear` inside the `with` block.

    Does nothing where that has no alternative to torch's own product; skips layers whose `forward` was replaced.
    """
    changed: list[Any] = []
    try:
        if quicker_products():
            for module in (module for model in models for module in model.modules()):
                if type(module) in (nn.Linear, Conv1D) and "forward" not in module.__dict__:
                    module.forward = LinearForward(module, transposed=type(module) is Conv1D)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward
