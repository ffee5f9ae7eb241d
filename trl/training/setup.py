"""Models and minibatch schedule that a trainer lends to an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from trl.protocols import Algorithm, Reduce
from trl.training.evaluator import Evaluated
from trl.types import E, Rollout, identity, take

Denominator = Literal["minibatch", "batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Models and schedule of one step."""

    policy: nn.Module
    evaluate: Callable[[Rollout], Evaluated]  # policy and reference, before the update
    generator: torch.Generator  # draws the order of minibatches
    temperature: float = 1.0  # sampling temperature
    size: int = 1  # sequences per optimizer step, on each process
    epochs: int = 1  # passes over an experience
    denominator: Denominator = "minibatch"
    reduce: Reduce = identity  # sums a tensor over all processes


@runtime_checkable
class Recipe(Protocol):
    """An algorithm's choices, not yet bound to models."""

    @property
    def name(self) -> str:
        """Prefix of the statistics, such as "grpo"."""
        ...

    @property
    def uses_reference(self) -> bool:
        """Whether the algorithm needs a reference model."""
        ...

    @property
    def settings(self) -> dict[str, str]:
        """Its choices in words, to tell runs apart."""
        ...

    def bind(self, setup: Setup) -> Algorithm:
        """Returns the algorithm for these models."""
        ...


def shuffled(experience: E, *, size: int, epochs: int, generator: torch.Generator) -> Iterator[E]:
    """Yields parts of `size` sequences, `epochs` times over the experience, each time in a new random order."""
    for _ in range(epochs):
        order = torch.randperm(len(experience), generator=generator, device="cpu").to(experience.scores.device)
        for rows in order.split(size):
            yield take(experience, rows)
