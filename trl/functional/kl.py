"""Estimators of KL(policy || reference), the exact KL, and the adaptive KL coefficient.

The estimators take log-probabilities of tokens sampled from the policy and are named after Schulman, "Approximating KL
divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q: unbiased, but negative for some samples. Any shape. As a loss, its expected gradient is 0."""
    return logprobs - ref_logprobs


def k1_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log p - log q|: not an estimate of the KL, but never negative. Any shape."""
    return (logprobs - ref_logprobs).abs()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log q)² / 2: biased, low variance, ≥ 0. Any shape. Its expected gradient is that of KL(p || q)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p): unbiased, ≥ 0. Any shape. Its expected gradient is that of KL(q || p)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Exact KL(p || q), summed over the whole vocabulary; the estimators approximate it.

    Args:
        logits: `[..., V]` of p.
        ref_logits: `[..., V]` of q.
        temperature: divides both logits; > 0.

    Returns:
        `[...]` in nats, ≥ 0. A word with p = 0 adds nothing; one with p > 0 and q = 0 makes it infinite.
    """
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    log_q = torch.log_softmax(ref_logits / temperature, dim=-1)
    p = log_p.exp()
    log_ratio = log_p - log_q.masked_fill(p == 0, 0.0)
    return (p * log_ratio.masked_fill(p == 0, 0.0)).sum(dim=-1)


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, episodes: int) -> float:
    """One update of the KL coefficient by the proportional controller of Ziegler et al. 2019, section 2.2.

    Args:
        kl_coef: current coefficient.
        kl: mean KL per sequence measured under it, in nats.
        target: target KL, in nats; > 0.
        horizon: episodes over which an error of 1 would about double the coefficient.
        episodes: sequences since the last update, over all processes.

    Returns:
        kl_coef · (1 + clip(kl / target - 1, -0.2, 0.2) · min(episodes / horizon, 1)), a change of at most 20%. Without
        the minimum, which the paper lacks, more than five horizons of episodes could make the coefficient negative and
        reward drift. Returns `kl_coef` unchanged if `kl` is NaN.
    """
    if math.isnan(kl):
        return kl_coef
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(episodes, horizon) / horizon)
