"""Statistics of one step, under TRL 0.4.6's key names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.functional import masked_moments, masked_sum
from trl.protocols import Reduce
from trl.training.loop import UpdateMetrics
from trl.types import Tally, identity


def stack_updates(history: Sequence[UpdateMetrics]) -> dict[str, Tensor]:
    """Stacks the metrics of `n` optimizer steps: `[n]` per mean, `[1, n · b · S]` per array."""
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


def pooled_mean(tally: Tally, reduce: Reduce = identity) -> Tensor:
    """Mean of a tally pooled over all processes; 0 if the total count is 0."""
    total, count = reduce(torch.stack([tally.sum, tally.count.to(tally.sum)]))
    return total / count.clamp(min=1)


def _mean_and_std(values: Tensor, counted: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Mean and Bessel-corrected std (0 for one value) of `values` `[B]` where `counted` `[B]`, over all processes."""
    mean, var, _ = masked_moments(values, counted, reduce)
    return mean, var.sqrt()


def _lengths(name: str, sequences: Sequence[Tensor], device: torch.device, reduce: Reduce) -> dict[str, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.float, device=device)
    mean, std = _mean_and_std(lengths, torch.ones_like(lengths).bool(), reduce)
    return {f"tokens/{name}_len_mean": mean, f"tokens/{name}_len_std": std, f"tokens/{name}_dist": lengths}


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
    reduce: Reduce = identity,
) -> dict[str, Any]:
    """Statistics of one step by key: scalars over all processes, arrays of this process.

    A row without a counted token enters only the length statistics.

    Args:
        kl_coef: weight of the KL in this step's rewards.
        scores: `[B]` raw scores.
        logprobs: `[B, S]` of the policy before the update.
        ref_logprobs: `[B, S]`.
        non_score_reward: `[B, S]`, -kl_coef · kl.
        mask: `[B, S]` bool.
        queries: `B` 1-D tensors.
        responses: `B` 1-D tensors.
        train_stats: one row per optimizer step, as from `stack_updates`; averaged over steps.
        reduce: sums a tensor over all processes.
    """
    counted = mask.any(dim=1)
    rows, scores = counted.sum(), scores.to(mask.device)
    kl = masked_sum(logprobs - ref_logprobs, mask, dim=1)
    mean_kl = pooled_mean(Tally(kl.sum(), rows), reduce)
    mean_score, std_score = _mean_and_std(scores, counted, reduce)
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
        "objective/entropy": pooled_mean(Tally(-masked_sum(logprobs, mask), rows), reduce),
        "ppo/mean_non_score_reward": pooled_mean(Tally.of(non_score_reward, mask), reduce),
        "ppo/mean_scores": mean_score,
        "ppo/std_scores": std_score,
        **_lengths("queries", queries, mask.device, reduce),
        **_lengths("responses", responses, mask.device, reduce),
    }
    stats |= {f"ppo/{name}": values.mean(dim=0) for name, values in train_stats.items()}
    error, spread = stats["ppo/val/error"], stats["ppo/returns/var"]
    stats["ppo/val/var_explained"] = 1 - error / spread if spread > 0 else torch.zeros_like(error)
    return stats
