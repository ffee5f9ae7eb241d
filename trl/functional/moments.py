"""Running mean and variance, as a pure update function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trl.types import Moments, identity


def update_moments(moments: Moments, values: Tensor, reduce: Callable[[Tensor], Tensor] = identity) -> Moments:
    """Merges `values` into the running moments.

    Args:
        moments: moments so far.
        values: this process's new values, any shape; computed in float64.
        reduce: sums a tensor over all processes, so that every process holds the same moments.
    """
    values = values.detach().double()
    totals = reduce(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))
    n = float(totals[1])
    if n == 0:
        return moments
    mean = float(totals[0]) / n
    return moments + Moments(mean=mean, squares=float(reduce(((values - mean) ** 2).sum())), count=n)
