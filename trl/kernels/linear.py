"""Linear layers that multiply in the quickest way while a pass is made, without a change of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.products import LinearForward, quicker_products


@contextmanager
def quick_products(*models: nn.Module) -> Iterator[None]:
    """Within, the linear layers of `models` multiply as `trl.kernels.products.linear` does.

    Where that has no other way than torch's, nothing is done; layers whose `forward` somebody replaced stay as they are.
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
