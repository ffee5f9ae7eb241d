"""Linear layers that multiply by `trl.kernels.products.linear`, forward and backward.

Replaces the `forward` of `nn.Linear` and transformers' `Conv1D` layers in the trainer's passes, on CPUs where torch's
float32 product is slow. Gain on two cores of a Zen 5 EPYC: float32 products twice as fast and more from 64 rows
(`python bench/products.py`). Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.door import replaced_forwards
from trl.kernels.products import LinearForward, prefers_onednn


@contextmanager
def fast_linear_layers(*models: nn.Module) -> Iterator[None]:
    """Makes the linear layers of `models` use `trl.kernels.products.linear` inside the `with` block.

    Does nothing where torch's own product is as fast; skips layers whose `forward` was replaced.
    """
    layers = {
        module: LinearForward(module, transposed=type(module) is Conv1D)
        for model in (models if prefers_onednn() else ())
        for module in model.modules()
        if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    }
    with replaced_forwards(layers):
        yield
