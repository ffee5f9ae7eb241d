"""The statistics of one step, under the names that TRL 0.4.6 gave them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.functional import masked_mean, masked_sum
from trl.training.loop import UpdateMetrics


def stack_updates(history: Sequence[UpdateMetrics]) -> dict[str, Tensor]:
    """Every number of every optimizer step: `[n]` per mean, `[1, n · b · S]` per array."""
    stacked = {
        name: torch.tensor([metrics.means[name] for metrics in history], dtype=torch.float32)
        for name in history[0].means
    }
    for name in history[0].arrays:
        stacked[name] = torch.cat([metrics.arrays[name].flatten() for metrics in history]).unsqueeze(0)
    stacked["grad_norm"] = torch.tensor([metrics.grad_norm for metrics in history], dtype=torch.float32)
    stacked["skipped_updates"] = torch.tensor([float(not metrics.stepped) for metrics in history])
    stacked["time/ppo/optimizer_step"] = torch.tensor([metrics.seconds for metrics in history])
    return stacked


def _lengths(name: str, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.float)
    return {
        f"tokens/{name}_len_mean": lengths.mean(),
        f"tokens/{name}_len_std": _std(lengths),
        f"tokens/{name}_dist": lengths,
    }


def _std(values: Tensor) -> Tensor:
    """Standard deviation with Bessel's correction; 0, not NaN, for a single value."""
    return values.std() if values.numel() > 1 else torch.zeros_like(values.sum())


def step_statistics(
    *,
    kl_coef: float,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    non_score_reward: Tensor,
    mask: Tensor,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    train_stats: Mapping[str, Tensor],
    rows: float | None = None,
) -> dict[str, Any]:
    """What one step did, by key: tensors of this process. A row without a counted token counts in the lengths alone.

    Args:
        kl_coef: weight of the KL in this step's rewards.
        scores: `[B]`, as they came.
        logprobs: `[B, S]` of the policy before the update.
        ref_logprobs: `[B, S]`.
        non_score_reward: `[B, S]`, -kl_coef · kl.
        mask: `[B, S]` bool.
        queries: `B` 1-D tensors.
        responses: `B` 1-D tensors.
        train_stats: one row per optimizer step, as from `stack_updates`; their means are reported.
        rows: rows with a counted token, the mean over all processes, so that the mean of the processes' means is that of
            all rows; those of this process if None.
    """
    counted = mask.any(dim=1)
    known = counted.sum().clamp(min=1) if rows is None else rows
    kl = masked_sum(logprobs - ref_logprobs, mask, dim=1)
    mean_kl = kl.sum() / known
    if mean_kl.item() < -1.0:
        warnings.warn(
            f"objective/kl is {mean_kl.item():.2f}: it should not be negative. Were the responses sampled with settings that "
            "reshape the distribution (top_k, top_p, min_length, repetition_penalty, another temperature)?",
            stacklevel=3,
        )
    stats: dict[str, Any] = {
        "objective/kl": mean_kl,
        "objective/kl_dist": kl,
        "objective/logprobs": logprobs,
        "objective/ref_logprobs": ref_logprobs,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -masked_sum(logprobs, mask, dim=1).sum() / known,
        "ppo/mean_non_score_reward": masked_mean(non_score_reward, mask),
        "ppo/mean_scores": scores[counted].sum() / known,
        "ppo/std_scores": _std(scores[counted]),
        **_lengths("queries", queries),
        **_lengths("responses", responses),
    }
    stats |= {f"ppo/{name}": values.mean(dim=0) for name, values in train_stats.items()}
    error, spread = stats["ppo/val/error"], stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - error / spread if spread > 0 else torch.zeros_like(error)
    return stats
