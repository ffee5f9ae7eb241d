"""Choices that make up a critic-free policy gradient: advantages of groups, ratios, surrogates and token weights.

Each choice is a pure function, and an algorithm is one of each: `trl.algorithms.policy_gradient`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Advantages ----------------------------------------------------------------------------------------------------------


def group_moments(scores: Tensor, group: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (with Bessel's correction) and size of each sequence's group.

    Args:
        scores: `[B]`.
        group: `[B]` int64, equal for responses to one prompt.
        counted: `[B]` bool, False leaves a score out of its group.

    Returns:
        Three `[B]` tensors, one entry per sequence; 0 for a group without a counted score.
    """
    dtype = scores.dtype
    same = ((group[:, None] == group) & counted).double()  # [B, B]
    scores = scores.masked_fill(~counted, 0.0).double()  # in float32, the mean of equal scores may be another number
    size = same.sum(dim=1)
    mean = same @ scores / size.clamp(min=1)
    squares = (same * (scores - mean[:, None]) ** 2).sum(dim=1)
    return mean.to(dtype), (squares / (size - 1).clamp(min=1)).sqrt().to(dtype), size.to(dtype)


def group_normalised(scores: Tensor, group: Tensor, counted: Tensor) -> Tensor:
    """(score - group mean) / (group std + 1e-4): GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    Arguments as for `group_moments`.

    Returns:
        `[B]` advantages; 0 in a group of equal scores.
    """
    mean, std, _ = group_moments(scores, group, counted)
    return (scores - mean) / (std + 1e-4)


# Ratios --------------------------------------------------------------------------------------------------------------


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """π / π_old of each token, `[B, S]`; 1 off the mask."""
    return (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()


# Surrogates ----------------------------------------------------------------------------------------------------------


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, low: float = 0.2, high: float = 0.2) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) of each token, `[B, S]` (PPO, Schulman et al. 2017, eq. 7)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


# Aggregates ----------------------------------------------------------------------------------------------------------


def per_sequence(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over each response, then over responses, which all weigh the same (GRPO, eq. 3).

    Args:
        mask: `[B, S]` bool.

    Returns:
        `[B, S]` weight of each token, and the scalar that the weights of this process add up to.
    """
    lengths = mask.sum(dim=1, keepdim=True)
    return mask / lengths.clamp(min=1), (lengths > 0).sum()


def per_token(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over all tokens, which all weigh the same (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 8).

    Arguments and results as for `per_sequence`.
    """
    return mask.float(), mask.sum()
