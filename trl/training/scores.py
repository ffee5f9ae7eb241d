"""Score shaping before scores become rewards, in order: missing-EOS penalty, scaling, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl.functional import Moments, update_moments
from trl.protocols import Reduce
from trl.types import Rollout, Scored, identity


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """Settings of `shape_scores`."""

    missing_eos_penalty: float | None = None  # subtracted from the score of a response without a final stop token
    scale: bool = False  # divide by the running standard deviation
    center: bool = False  # with `scale`: subtract the running mean first
    clip: float | None = None  # then clamp to ± this


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    moments: Moments,
    settings: ScoreSettings,
    reduce: Reduce = identity,
    counted: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Applies the missing-EOS penalty, scaling and clipping to scores.

    Args:
        scores: `[B]`.
        finished: `[B]` bool, True for responses that end with a stop token.
        moments: running moments of earlier scores.
        settings: the transformations to apply.
        reduce: sums a tensor over all processes.
        counted: `[B]` bool, scores to include in the moments; all if None.

    Returns:
        `[B]` shaped scores, and the moments of these scores alone, empty unless `settings.scale` (the same on every
        process): add them to the running ones.
    """
    new_moments = Moments()
    if settings.missing_eos_penalty is not None:
        limits = torch.finfo(scores.dtype)  # an infinite score would permanently corrupt the moments
        penalised = (scores - settings.missing_eos_penalty).clamp(limits.min, limits.max)
        scores = torch.where(finished, scores, penalised)
    if settings.scale:
        new_moments = update_moments(new_moments, scores if counted is None else scores[counted], reduce)
        moments += new_moments
        scores = (scores - moments.mean if settings.center else scores) / moments.std
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores, new_moments


def ends_with(rollout: Rollout, stop_tokens: Sequence[int]) -> Tensor:
    """`[B]` bool, True for responses whose last token is in `stop_tokens`."""
    attention = rollout.attention.bool()
    columns = torch.arange(attention.shape[1], device=attention.device)
    last = torch.where(attention, columns, 0).amax(dim=1, keepdim=True)
    tokens = rollout.tokens.gather(1, last).squeeze(1)
    return torch.isin(tokens, torch.tensor(sorted(stop_tokens), dtype=tokens.dtype, device=tokens.device))


def scores_of(rollout: Rollout, scored: Scored) -> tuple[Rollout, Tensor, Tensor | None]:
    """Converts a reward's scores to tensors and masks out samples without a score.

    Args:
        rollout: `B` sequences.
        scored: their scores, in order.

    Returns:
        The rollout, with samples that have no score masked out; float32 scores `[B]`, 0 where missing; and per-token
        rewards `[B, S]`, or None if no sample has any.
    """
    device = rollout.tokens.device
    has_score = torch.tensor([score is not None for score in scored.scores], device=device)
    if not bool(has_score.all()):
        rollout = replace(rollout, mask=rollout.mask & has_score[:, None])
    scores = torch.tensor([score or 0.0 for score in scored.scores], dtype=torch.float32, device=device)
    if all(tokens is None for tokens in scored.token_rewards):
        return rollout, scores, None
    rewards = torch.zeros(rollout.mask.shape, dtype=torch.float32, device=device)
    for row, (tokens, attended) in enumerate(zip(scored.token_rewards, rollout.attention.bool(), strict=True)):
        if tokens:  # the last attended tokens are the response; column s predicts token s + 1
            columns = attended.nonzero().squeeze(1)[-len(tokens) :] - 1
            rewards[row, columns] = torch.tensor(tokens, dtype=torch.float32, device=device)
    return rollout, scores, rewards
