"""What the best of n samples is worth, and how far it is from the policy that they were drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def expected_maximum(scores: Tensor, n: int) -> Tensor:
    """Unbiased estimate of the expected best score of n samples, from M >= n samples of each prompt.

    Averages the maximum over all subsets of n of the M scores: sorted ascending, the i-th (from 1) is the largest of
    C(i − 1, n − 1) of the C(M, n) subsets.

    Args:
        scores: `[..., M]`.
        n: size of the subsets, from 1 to M.

    Returns:
        `[...]` expected maxima, float64.

    Raises:
        ValueError: if `n` is not from 1 to M.
    """
    size = scores.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n={n} must be from 1 to the {size} samples of each prompt")
    weights = [math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)]
    ordered = scores.detach().double().sort(dim=-1).values
    return ordered @ torch.tensor(weights, dtype=torch.float64, device=scores.device)


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats of KL(best-of-n ‖ policy): log n − (n − 1) / n.

    Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; a bound by Beirami et al. 2024, arXiv:2401.01879, theorem 1.
    """
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True, slots=True)
class BestOf:
    """One point of a best-of-n curve."""

    n: int
    score: float  # expected best score of n samples, averaged over prompts
    error: float  # standard error of `score` over prompts; NaN for a single prompt
    kl: float  # bound of `best_of_n_kl`, in nats


def best_of_n_curve(scores: Tensor, sizes: Sequence[int] | None = None) -> list[BestOf]:
    """Expected best score by n, each with the KL that it is bought at.

    Args:
        scores: `[P, M]`, M samples of each of P prompts.
        sizes: values of n, each from 1 to M; by default 1, 2, 4 ... and M.

    Raises:
        ValueError: if `scores` is not 2-D, is empty or not finite, or one of `sizes` is out of range.
    """
    if scores.dim() != 2 or not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError(
            f"scores must be finite and of shape [prompts, samples]; got shape {list(scores.shape)}, of which "
            f"{int(scores.isfinite().sum())} of {scores.numel()} are finite"
        )
    prompts, samples = scores.shape
    if sizes is None:
        sizes = sorted({min(2**power, samples) for power in range(samples.bit_length() + 1)})
    points = []
    for n in sizes:
        best = expected_maximum(scores, n)  # [P]
        error = float(best.std()) / math.sqrt(prompts) if prompts > 1 else math.nan
        points.append(BestOf(n, float(best.mean()), error, best_of_n_kl(n)))
    return points
