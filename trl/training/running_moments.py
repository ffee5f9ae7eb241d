"""`RunningMoments`: running mean and standard deviation of a stream of numbers, across processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trl.files import write_atomic
from trl.functional.moments import update_moments
from trl.training.processes import sum_over_processes
from trl.types import Moments


@dataclass
class RunningMoments:
    """Running moments of a stream of numbers, for scripts; the trainer's own are `trl.functional.update_moments`.

    Args:
        accelerator: an `accelerate.Accelerator`; every one of its processes must call `update`.
        mean: mean so far. A float64 scalar tensor on the CPU from the first update on, as `std` and `var`.
        std: standard deviation with Bessel's correction.
        var: variance without it.
        count: numbers seen so far; slightly above 0 at the start, so that it never divides by 0.
    """

    accelerator: Any
    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0
    var: float | Tensor = 1.0
    count: float = 1e-24

    @torch.no_grad()
    def update(self, xs: Tensor) -> tuple[float, float]:
        """Adds numbers of any shape.

        Args:
            xs: this process's numbers.

        Returns:
            Mean and standard deviation, with Bessel's correction, of the numbers of all processes in this call.
        """
        batch = update_moments(Moments(), xs, lambda sums: sum_over_processes(self.accelerator, sums))
        total = Moments(mean=float(self.mean), squares=float(self.var) * self.count, count=self.count) + batch
        # Scores are divided by std, which is undefined for one number: keep its previous value.
        std = _std(total) if total.count > 1 else float(self.std)
        self.mean, self.var, self.std = torch.tensor(
            [total.mean, total.squares / total.count, std], dtype=torch.float64
        )
        self.count = total.count
        return batch.mean, _std(batch)

    def save_to_json(self, json_path: str) -> None:
        """Writes everything but the accelerator to a JSON file."""
        moments = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "accelerator"}
        write_atomic(json_path, json.dumps(moments, indent=2).encode())

    @classmethod
    def load_from_json(cls, accelerator: Any, json_path: str) -> RunningMoments:
        """Reads a file written by `save_to_json`."""
        with open(json_path, encoding="utf-8") as file:
            return cls(accelerator, **json.load(file))


def _std(moments: Moments) -> float:
    """Standard deviation with Bessel's correction; NaN of fewer than two numbers."""
    return (moments.squares / (moments.count - 1)) ** 0.5 if moments.count > 1 else float("nan")
