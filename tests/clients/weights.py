"""Whether training has changed a model, for the assertions at the end of a client."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two copies agree to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def finite(stats: dict[str, Any], *names: str) -> None:
    """Asserts that statistics are there and are numbers."""
    for name in names:
        assert torch.isfinite(torch.as_tensor(stats[name], dtype=torch.float64)).all(), f"{name} is {stats.get(name)}"
