"""What processes have to tell each other. Collective calls stand in this room alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def sum_over_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """The sum of `tensor`, of one shape everywhere, over all processes. Every process must call this."""
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor
