"""`PromptSampler`: chooses each step's prompts; seeded, sharded and resumable at any step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Remainder = Literal["carry", "drop"]

_VERSION = 1


class PromptSampler:
    """Yields batches of prompt indices without end, reshuffling every epoch.

    The order of an epoch depends only on `seed` and the epoch number. It uses the raw stream of NumPy's PCG64, which is
    stable across versions, and no global generator. A step's prompts are the same for any number of processes: each
    process computes the whole batch and takes its share, without communication that could hang.

    Args:
        size: number of prompts.
        batch_size: prompts per step over all processes; a multiple of `world`.
        seed: shuffling seed, 0 or more.
        rank: rank of this process.
        world: number of processes.
        shuffle: False keeps the prompts in their original order.
        remainder: what to do if `size` is not a multiple of `batch_size`. "carry" fills the last batch from the next
            epoch, so that every prompt is used once per epoch and `size` may be smaller than `batch_size`. "drop" skips
            the last prompts of each epoch and counts them in `dropped`.

    Raises:
        ValueError: if an argument is out of range or, with "drop", `size` is smaller than one batch.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        remainder: Remainder = "carry",
    ) -> None:
        minimums = {"size": (size, 1), "batch_size": (batch_size, 1), "seed": (seed, 0), "world": (world, 1)}
        for name, (value, minimum) in (minimums | {"rank": (rank, 0)}).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}")
        if rank >= world:
            raise ValueError(f"rank={rank} must be below world={world}")
        if batch_size % world:
            raise ValueError(f"batch_size={batch_size} over all processes is not a multiple of world={world}")
        if remainder not in get_args(Remainder):
            raise ValueError(f"remainder={remainder!r} must be one of {', '.join(get_args(Remainder))}")
        if remainder == "drop" and size < batch_size:
            raise ValueError(
                f"{size} prompts are fewer than batch_size={batch_size}, so remainder='drop' would skip every epoch "
                "entirely; remainder='carry' fills the batch from the next epoch"
            )
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, bool(shuffle)
        self.rank, self.world, self.remainder = rank, world, remainder
        self.epoch = 0  # epoch of the next prompt, from 0
        self.position = 0  # position of the next prompt in its epoch, 0 to size - 1
        self._order: tuple[int, NDArray[np.int64]] | None = None  # cached epoch number and its order
        if self._skipped_per_epoch:
            logger.warning("skipping %d of %d prompts in every epoch (remainder='drop')", self._skipped_per_epoch, size)

    @property
    def dropped(self) -> int:
        """Number of prompts skipped so far, over all processes."""
        return self.epoch * self._skipped_per_epoch

    def next(self) -> list[int]:
        """This process's share of the next batch: `batch_size / world` indices."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            stop = min(self.position + self.batch_size - len(batch), self.size - self._skipped_per_epoch)
            batch += self._order_of(self.epoch)[self.position : stop].tolist()
            self.position = stop
            if self.position == self.size - self._skipped_per_epoch:
                self.epoch, self.position = self.epoch + 1, 0
        share = self.batch_size // self.world
        return batch[self.rank * share : (self.rank + 1) * share]

    def __next__(self) -> list[int]:
        return self.next()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch and the settings it depends on, as JSON values; the same on every process."""
        return {"version": _VERSION, "epoch": self.epoch, "position": self.position} | self._settings()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the position saved in `state`. Only the number of processes may differ.

        Raises:
            ValueError: if size, batch_size, seed, shuffle or remainder differ (all differences are named), or `state`
                is invalid; the sampler is unchanged.
        """
        expected = {"version", "epoch", "position", *self._settings()}
        if set(state) != expected:
            raise ValueError(
                f"the sampler's state has the keys {', '.join(sorted(state))}; expected {', '.join(sorted(expected))}"
            )
        if state["version"] != _VERSION:
            raise ValueError(f"the sampler's state has version {state['version']!r}; this trl reads version {_VERSION}")
        differences = [
            f"{name} was {state[name]!r} and is {value!r} now"
            for name, value in self._settings().items()
            if state[name] != value
        ]
        if differences:
            raise ValueError("the prompt order cannot be resumed: " + "; ".join(differences))
        epoch, position = state["epoch"], state["position"]
        for name, value, end in (("epoch", epoch, None), ("position", position, self.size - self._skipped_per_epoch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (end is not None and value >= end):
                allowed = "of at least 0" if end is None else f"from 0 to {end - 1}"
                raise ValueError(f"the sampler's state has {name}={value!r}; expected an integer {allowed}")
        if self.remainder == "drop" and position % self.batch_size:
            raise ValueError(
                f"the sampler's state has position={position}, which is not a multiple of batch_size={self.batch_size}"
            )
        self.epoch, self.position = epoch, position

    @property
    def _skipped_per_epoch(self) -> int:
        """Number of prompts skipped in every epoch."""
        return self.size % self.batch_size if self.remainder == "drop" else 0

    def _settings(self) -> dict[str, Any]:
        names = ("size", "batch_size", "seed", "shuffle", "remainder")
        return {name: getattr(self, name) for name in names}

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.arange(self.size)
            if self.shuffle:
                # Sort by random 64-bit keys: NumPy may change the algorithm of Generator.permutation.
                bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
                order = np.argsort(bits.random_raw(self.size), kind="stable")
            self._order = (epoch, order)
        return self._order[1]
