"""What the tests of this folder and of `tests/conformance` share: ragged data, brute-force oracles, pretended processes.

The oracles are plain Python over lists of floats (float64). They loop, never broadcast, and import nothing of `trl`.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

POISONS = (float("nan"), float("inf"), 1e9)


# --- data ---------------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on the shape and the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def f64(numbers: Any) -> Tensor:
    """Python's floats as a tensor that keeps all their digits."""
    return torch.tensor(numbers, dtype=torch.float64)


def ragged_mask(lengths: Sequence[int], width: int) -> Tensor:
    """`[B, width]` bool with `lengths` True columns from the left."""
    return torch.tensor([[column < length for column in range(width)] for length in lengths])


@st.composite
def masks(draw: Any, max_rows: int = 4, max_columns: int = 7) -> Tensor:
    """Any `[B, S]` mask: full, empty, ragged, with holes."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    bits = draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(bits).view(rows, columns)


@st.composite
def masked_arrays(draw: Any, arrays: int = 1) -> tuple[Tensor, ...]:
    """A `[B, S]` mask and so many float64 arrays of its shape."""
    mask = draw(masks())
    seed = draw(st.integers(0, 2**20))
    return (mask, *(randn(*mask.shape, seed=seed + i) for i in range(arrays)))


def kept(values: Tensor, mask: Tensor) -> list[float]:
    """What `mask` counts, row by row."""
    return [float(v) for row, bits in zip(values, mask) for v, bit in zip(row, bits) if bit]


# --- oracles ------------------------------------------------------------------------------------------------------


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities; a logit of -inf gives 0."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def entropy(logits: Sequence[float], temperature: float = 1.0) -> float:
    """Of the full distribution, in nats."""
    return -math.fsum(p * math.log(p) for p in softmax(logits, temperature) if p > 0)


def variance(numbers: Sequence[float]) -> float:
    """With Bessel's correction; 0 for fewer than two numbers."""
    return statistics.variance(numbers) if len(numbers) > 1 else 0.0


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns by the definition: a double sum of TD errors over the tokens that count, 0 elsewhere."""
    advantages, returns = [], []
    for b in range(len(mask)):
        columns = [s for s in range(mask.shape[1]) if mask[b, s]]
        r, v = [float(rewards[b, s]) for s in columns], [float(values[b, s]) for s in columns]
        v.append(0.0 if bootstrap is None else float(bootstrap[b]))
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        sums = [math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(r))) for t in range(len(r))]
        row_a, row_r = [0.0] * mask.shape[1], [0.0] * mask.shape[1]
        for t, s in enumerate(columns):
            row_a[s], row_r[s] = sums[t], sums[t] + v[t]
        advantages.append(row_a)
        returns.append(row_r)
    return advantages, returns


def policy_term(ratio: float, advantage: float, epsilon: float, dual_clip: float | None = None) -> float:
    """One token's loss: the case table of the clipped surrogate, without a maximum or a minimum."""
    if advantage >= 0:
        return -advantage * (1 + epsilon if ratio > 1 + epsilon else ratio)
    if dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip
    return -advantage * (1 - epsilon if ratio < 1 - epsilon else ratio)


def value_term(value: float, old: float, target: float, clip_range: float) -> float:
    """One token's loss: half the larger squared error."""
    held = old + clip_range if value > old + clip_range else old - clip_range if value < old - clip_range else value
    return max((value - target) ** 2, (held - target) ** 2) / 2


# --- processes ----------------------------------------------------------------------------------------------------


class Ranks:
    """Pretends to be several processes: one thread each, meeting in `reduce`.

    A rank that calls `reduce` more or less often than the others breaks the barrier, as it would hang a cluster.
    """

    def __init__(self, size: int, timeout: float = 20.0) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._parts: list[Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        """`work(rank, reduce)` on every rank; their results in order."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                results[rank] = work(rank, lambda part: self._reduce(rank, part))
            except BaseException as error:  # handed to the caller below
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results

    def _reduce(self, rank: int, part: Tensor) -> Tensor:
        self._parts[rank] = part
        self._barrier.wait()
        total = torch.stack(list(self._parts)).sum(dim=0)
        self._barrier.wait()  # nobody overwrites a part before all have read it
        return total
