"""What the best of n samples is worth, and how far it is from the policy that they were drawn from."""

from __future__ import annotations

import math

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
