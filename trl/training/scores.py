"""What happens to scores before they become rewards, in this order: missing-eos penalty, scaling, clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl.functional import Moments, update_moments
from trl.protocols import Reduce
from trl.types import identity


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """How scores are shaped."""

    missing_eos_penalty: float | None = None  # taken off the score of a response that does not end with a stop token
    scale: bool = False  # divide by the running standard deviation
    center: bool = False  # with `scale`: take the running mean off first
    clip: float | None = None  # then clamp to ± this


def shape_scores(
    scores: Tensor,
    finished: Tensor,
    moments: Moments,
    settings: ScoreSettings,
    reduce: Reduce = identity,
    counted: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Applies the settings to `scores` [B].

    Args:
        scores: `[B]`.
        finished: `[B]` bool, which responses end with a stop token.
        moments: of the scores before these.
        settings: what to do.
        reduce: sums a tensor over all processes.
        counted: `[B]` bool, which scores the moments are to see; all if None.

    Returns:
        `[B]` shaped scores, and the moments with these scores in them (the same on every process).
    """
    if settings.missing_eos_penalty is not None:
        limits = torch.finfo(scores.dtype)  # an infinite score would ruin the moments for good
        penalised = (scores - settings.missing_eos_penalty).clamp(limits.min, limits.max)
        scores = torch.where(finished, scores, penalised)
    if settings.scale:
        moments = update_moments(moments, scores if counted is None else scores[counted], reduce)
        scores = (scores - moments.mean if settings.center else scores) / moments.std
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores, moments


def ends_with(responses: Sequence[Tensor], stop_tokens: Sequence[int]) -> Tensor:
    """`[B]` bool: does the last token of each response belong to `stop_tokens`?"""
    stops = set(stop_tokens)
    return torch.tensor([int(response[-1]) in stops for response in responses], dtype=torch.bool)
