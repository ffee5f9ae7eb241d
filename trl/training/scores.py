"""Score shaping before scores become rewards, in order: missing-EOS penalty, scaling, clipping."""

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
    own = Moments()
    if settings.missing_eos_penalty is not None:
        limits = torch.finfo(scores.dtype)  # an infinite score would permanently corrupt the moments
        penalised = (scores - settings.missing_eos_penalty).clamp(limits.min, limits.max)
        scores = torch.where(finished, scores, penalised)
    if settings.scale:
        own = update_moments(own, scores if counted is None else scores[counted], reduce)
        moments += own
        scores = (scores - moments.mean if settings.center else scores) / moments.std
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    return scores, own


def ends_with(responses: Sequence[Tensor], stop_tokens: Sequence[int]) -> Tensor:
    """`[B]` bool, True for responses whose last token is in `stop_tokens`."""
    stops = set(stop_tokens)
    return torch.tensor([int(response[-1]) in stops for response in responses], dtype=torch.bool)
