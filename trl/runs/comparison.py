"""Comparison of the trained policy with its base: both answer the same prompts with the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl.data import Prompt
from trl.functional.intervals import Estimate, mean_estimate, proportion_estimate
from trl.protocols import Reward
from trl.rewards import as_reward
from trl.runs.evaluation import NothingScored, ScoredResponse, respond_and_score
from trl.training.run_state import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedPrompt:
    """A prompt, the responses of both models, and their scores; None where the reward gave none."""

    prompt: str
    trained: str
    trained_score: float | None
    base: str | None = None  # None if the trainer has no reference
    base_score: float | None = None
    error: str | None = None  # first error of the reward on the two responses


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models."""

    score: Estimate  # mean, with Student's t interval
    length: float  # mean, in tokens
    truncated: float  # share of responses cut at the limit of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The trained policy against its base, on the same prompts; `str` is a table, `to_dict` plain JSON.

    A prompt on which either response has no score is excluded from everything but lengths, truncation and KL.
    """

    prompts: int
    excluded: int
    """Prompts without a score for one of the two responses."""
    confidence: float
    """Coverage of the intervals, such as 0.95."""
    trained: Side
    base: Side | None
    """None if the trainer has no reference: then `difference` and `win_rate` are None as well."""
    difference: Estimate | None
    """Mean of trained score - base score by prompt, with the paired t interval."""
    win_rate: Estimate | None
    """Share of prompts on which the trained policy has the higher score, ties counted half, with Wilson's interval."""
    wins: int
    losses: int
    ties: int
    kl: Estimate | None
    """KL of the trained policy to the reference on its own responses, in nats per response, with Student's t
    interval."""
    kl_per_token: float | None
    """The same in nats per token: the sum over all responses by the number of their tokens."""
    rows: tuple[ComparedPrompt, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON; numbers that are not finite become None."""
        result = _plain(asdict(self))
        assert isinstance(result, dict)
        return result

    def __str__(self) -> str:
        excluded = f", {self.excluded} excluded for want of a score" if self.excluded else ""
        lines = [f"{self.prompts} prompts{excluded}; intervals of {self.confidence:.0%} confidence"]
        base = self.base
        table = [
            ["", "trained", *(["base", "difference"] if base else [])],
            [
                "score",
                _shown(self.trained.score),
                *([_shown(base.score), _shown(self.difference, "+")] if base else []),
            ],
            ["tokens", f"{self.trained.length:.1f}", *([f"{base.length:.1f}"] if base else [])],
            ["truncated", f"{self.trained.truncated:.0%}", *([f"{base.truncated:.0%}"] if base else [])],
        ]
        widths = [max((len(row[i]) for row in table if i < len(row)), default=0) for i in range(len(table[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in table
        ]
        if self.win_rate is not None:
            counts = f"{self.wins} wins, {self.losses} losses, {self.ties} ties" + (
                ", counted half" if self.ties else ""
            )
            low, high = self.win_rate.low, self.win_rate.high
            lines.append(f"win rate {self.win_rate.value:.0%} [{low:.0%}, {high:.0%}]: {counts}")
        else:
            lines.append("no reference model, so the trained policy alone")
        if self.kl is not None and self.kl_per_token is not None:
            lines.append(f"KL to the base {_shown(self.kl)} nats per response, {self.kl_per_token:.3f} per token")
        if self.difference is not None and self.difference.low <= 0 <= self.difference.high:
            lines.append("The interval of the difference includes 0: it may be chance. More prompts make it narrower.")
        return "\n".join(lines)


def compare(
    trainer: Learner,
    prompts: Sequence[Prompt],
    reward: Any,
    generation: Mapping[str, Any],
    *,
    seed: int,
    confidence: float,
) -> Comparison:
    """Samples from the policy and from the reference with the same random numbers, and scores both.

    Every process must call this. The trainer's `evaluate` explains the arguments.
    """
    source = _excluding_failures(reward)
    try:
        trained = respond_and_score(trainer, prompts, source, generation, seed=seed)
        base = None
        if trainer._trl_uses_reference:
            base = respond_and_score(trainer, prompts, source, generation, seed=seed, base=True)
    finally:
        source.close()
    return _compared(trained, base, confidence)


def _excluding_failures(reward: Any) -> Reward:
    """Builds the reward: functions exclude samples on which they fail, ready-made rewards keep their settings."""
    members = (
        reward.values() if isinstance(reward, Mapping) else reward if isinstance(reward, list | tuple) else [reward]
    )
    if any(callable(getattr(member, "score", None)) for member in members):
        return as_reward(reward)
    return as_reward(reward, on_error="skip")


def _compared(
    trained: Sequence[ScoredResponse], base: Sequence[ScoredResponse] | None, confidence: float
) -> Comparison:
    """Raises NothingScored if no prompt has a score for every response."""
    others: Sequence[ScoredResponse | None] = [None] * len(trained) if base is None else base
    rows = tuple(
        ComparedPrompt(
            prompt=ours.prompt,
            trained=ours.completion,
            trained_score=ours.score,
            base=None if theirs is None else theirs.completion,
            base_score=None if theirs is None else theirs.score,
            error=ours.error or (None if theirs is None else theirs.error),
        )
        for ours, theirs in zip(trained, others, strict=True)
    )
    if base is None:
        pairs = [(row.trained_score, 0.0) for row in rows if row.trained_score is not None]
    else:
        scores = [(row.trained_score, row.base_score) for row in rows]
        pairs = [(ours, theirs) for ours, theirs in scores if ours is not None and theirs is not None]
    if not pairs:
        error = next((row.error for row in rows if row.error is not None), "the reward returned None")
        raise NothingScored(f"none of {len(rows)} prompts has a score for every response; first error: {error}")
    differences = [ours - theirs for ours, theirs in pairs]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    ties = len(pairs) - wins - losses
    kls = [row.kl for row in trained]
    known_kl = base is not None
    return Comparison(
        prompts=len(rows),
        excluded=len(rows) - len(pairs),
        confidence=confidence,
        trained=_side(trained, [ours for ours, _ in pairs], confidence),
        base=None if base is None else _side(base, [theirs for _, theirs in pairs], confidence),
        difference=None if base is None else mean_estimate(differences, confidence),
        win_rate=None if base is None else proportion_estimate(wins + ties / 2, len(pairs), confidence),
        wins=wins if base is not None else 0,
        losses=losses if base is not None else 0,
        ties=ties if base is not None else 0,
        kl=mean_estimate(kls, confidence) if known_kl else None,
        kl_per_token=math.fsum(kls) / max(1, sum(row.length for row in trained)) if known_kl else None,
        rows=rows,
    )


def _side(responses: Sequence[ScoredResponse], scores: Sequence[float], confidence: float) -> Side:
    return Side(
        score=mean_estimate(scores, confidence),
        length=math.fsum(row.length for row in responses) / len(responses),
        truncated=sum(not row.finished for row in responses) / len(responses),
    )


def _shown(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    half = (estimate.high - estimate.low) / 2
    # Three significant digits of the uncertainty.
    form = (
        f"{sign}.{min(6, max(0, 2 - math.floor(math.log10(half))))}f"
        if math.isfinite(half) and half > 0
        else f"{sign}.4g"
    )
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
