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


def update_statistics(norm: float, stepped: bool, seconds: float) -> dict[str, Tensor]:
    """Statistics of one optimizer step, from the result of `Updater.step`."""
    return {
        "grad_norm": torch.tensor(norm, dtype=torch.float32),
        "skipped_updates": torch.tensor(float(not stepped), dtype=torch.float32),
        "time/ppo/optimizer_step": torch.tensor(seconds, dtype=torch.float32),
    }


def stack_updates(history: Sequence[UpdateMetrics]) -> dict[str, Tensor]:
    """Stacks the metrics of `n` optimizer steps: `[n]` per mean, `[1, n · b · S]` per array."""
    return stack_statistics(
        [
            {name: torch.tensor(mean, dtype=torch.float32) for name, mean in metrics.means.items()}
            | metrics.arrays
            | update_statistics(metrics.grad_norm, metrics.stepped, metrics.seconds)
            for metrics in history
        ]
    )


def stack_statistics(history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks the statistics of `n` optimizer steps: `[n]` per single number, `[1, n · ...]` per array."""
    stacked = {}
    for name in history[0]:
        column = [statistics[name] for statistics in history]
        if column[0].dim() < 2 and column[0].numel() == 1:
            stacked[name] = torch.stack([number.reshape(()).float().cpu() for number in column])
        else:
            stacked[name] = torch.cat([array.flatten() for array in column]).unsqueeze(0)
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
    name: str = "ppo",
    kl_coef: float | None,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    non_score_reward: Tensor | None,
    mask: Tensor,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    train_stats: Mapping[str, Tensor],
    reduce: Reduce = identity,
) -> dict[str, Any]:
    """Statistics of one step by key: scalars over all processes, arrays of this process.

    A row without a counted token enters only the length statistics.

    Args:
        name: prefix of the algorithm's own statistics.
        kl_coef: weight of the KL in this step's rewards; None if they include no KL.
        scores: `[B]` raw scores.
        logprobs: `[B, S]` of the policy before the update.
        ref_logprobs: `[B, S]`, or None without a reference, which omits the KL statistics.
        non_score_reward: `[B, S]`, -kl_coef · kl; None if the rewards include no KL.
        mask: `[B, S]` bool.
        queries: `B` 1-D tensors.
        responses: `B` 1-D tensors.
        train_stats: one row per optimizer step, as from `stack_updates`; averaged over steps.
        reduce: sums a tensor over all processes.
    """
    counted = mask.any(dim=1)
    rows, scores = counted.sum(), scores.to(mask.device)
    mean_score, std_score = _mean_and_std(scores, counted, reduce)
    stats: dict[str, Any] = {}
    if ref_logprobs is not None:
        stats |= _kl_statistics(logprobs, ref_logprobs, mask, rows, reduce)
    if kl_coef is not None:
        stats["objective/kl_coef"] = kl_coef
    stats |= {
        "objective/logprobs": logprobs,
        "objective/entropy": pooled_mean(Tally(-masked_sum(logprobs, mask), rows), reduce),
        f"{name}/mean_scores": mean_score,
        f"{name}/std_scores": std_score,
        **_lengths("queries", queries, mask.device, reduce),
        **_lengths("responses", responses, mask.device, reduce),
    }
    if non_score_reward is not None:
        stats[f"{name}/mean_non_score_reward"] = pooled_mean(Tally.of(non_score_reward, mask), reduce)
    for key, values in train_stats.items():
        stats[f"{name}/{key.replace('time/ppo/', f'time/{name}/')}"] = values.mean(dim=0)
    if "val/error" in train_stats:
        error, variance = stats[f"{name}/val/error"], stats[f"{name}/returns/var"]
        stats[f"{name}/val/var_explained"] = 1 - error / variance if variance > 0 else torch.zeros_like(error)
    return stats


def _kl_statistics(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, rows: Tensor, reduce: Reduce
) -> dict[str, Tensor]:
    """KL to the reference, per sequence; warns if its mean is clearly negative."""
    kl = masked_sum(logprobs - ref_logprobs, mask, dim=1)
    mean_kl = pooled_mean(Tally(kl.sum(), rows), reduce)
    if mean_kl.item() < -1.0:
        warnings.warn(
            f"objective/kl is {mean_kl.item():.2f}: it should not be negative. Were the responses sampled with "
            "settings that reshape the distribution (top_k, top_p, min_length, repetition_penalty, another "
            "temperature)?",
            stacklevel=4,
        )
    return {"objective/kl": mean_kl, "objective/kl_dist": kl, "objective/ref_logprobs": ref_logprobs}
