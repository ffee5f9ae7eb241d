"""Running mean and variance, as a pure update function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl.types import identity


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean, sum of squared deviations and count of all values seen so far."""

    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    count: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with Bessel's correction; 1 if fewer than two values were seen or all were equal."""
        var = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return var**0.5 if var > 0 else 1.0

    def __add__(self, other: Moments) -> Moments:
        """Moments of the values of both (parallel algorithm of Chan et al. 1979)."""
        if other.count == 0:
            return self
        delta, count = other.mean - self.mean, self.count + other.count
        return Moments(
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta**2 * self.count * other.count / count,
            count=count,
        )


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
