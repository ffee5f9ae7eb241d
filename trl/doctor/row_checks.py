"""Checks of a run's rows of metrics, one after another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl.doctor.codes import finding
from trl.health import METRICS, Band, bands, catalogued, is_telling, measured
from trl.trackers.findings import Finding

_SAMPLES = 32  # samples to see before a share or a constant is judged
_SHORT = 8  # tokens; in shorter responses a sharp policy is what a healthy run ends with
_COLLAPSED = 1.0  # nats per token; the demo stays below 0.4, and a policy ruined by its learning rate was at 10
_VALUE_FACTOR = 10.0  # as in batch_checks


class _Rule(NamedTuple):
    """When a code is found: after so many consecutive rows that break the rule, and so many samples of the run."""

    code: str
    rows: int
    broken: Callable[[RowChecks, Mapping[str, Any]], str | None]
    """What a row says against it, or None."""
    samples: int = 0


@dataclass
class RowChecks:
    """Judges rows by the healthy bands of `trl.health`. The same rows give the same findings.

    Args:
        config: contents of `config.resolved.yaml`.
        expects_end: whether responses are meant to end before the limit, beyond what `config` says.
    """

    config: Mapping[str, Any]
    expects_end: bool = False

    def __post_init__(self) -> None:
        ppo = self.config.get("ppo") or {}
        self.name: str = (self.config.get("algorithm") or {}).get("name", "ppo")
        self.expects_end |= ppo.get("missing_eos_penalty") is not None or bool(ppo.get("stop_token_ids"))
        self.bands: dict[str, Band] = {}
        self.first: Mapping[str, Any] | None = None
        self._streaks: Counter[str] = Counter()
        self._found: set[str] = set()
        self._spread = 0.0  # largest standard deviation of a batch's scores
        self._varied = False  # whether the scores have differed from each other, or from batch to batch
        self._ended = False  # whether most responses of some batch ended by themselves

    def see(self, row: Mapping[str, Any]) -> list[Finding]:
        """Judges the next row, which includes `step`; returns what it completes the evidence for."""
        if self.first is None and number(row, "score/mean") is not None:
            self.first, self.bands = row, bands(self.config, row)
        self._spread = max(self._spread, number(row, "score/std") or 0.0)
        findings = []
        for rule in _RULES:
            code = rule.code
            evidence = None if code in self._found else rule.broken(self, row)
            self._streaks[code] = 0 if evidence is None else self._streaks[code] + 1
            enough = self._streaks[code] >= rule.rows and (number(row, "run/episodes") or 0) >= rule.samples
            if evidence is not None and enough:
                self._found.add(code)
                step = int(row["step"])
                span = f"in steps {step - self._streaks[code] + 1} to {step}"
                findings.append(finding(code, f"{evidence} ({span})", step=step))
        return findings

    def key(self, name: str) -> str:
        """The run's key of one of PPO's statistics."""
        return f"{self.name}/{name.removeprefix('ppo/')}"

    def outside(self, row: Mapping[str, Any], key: str, side: str, factor: float = 1.0) -> str | None:
        """What a row says if it is below ("low") or above ("high") `factor` times the bound of a healthy band."""
        band, value = self.bands.get(key), number(row, key)
        bound = None if band is None else getattr(band, side)
        if band is None or bound is None or value is None:
            return None
        if not (value > factor * bound if side == "high" else value < factor * bound):
            return None
        return f"{key} = {value:.3g}; healthy is {'at most' if side == 'high' else 'at least'} {bound:.3g}"


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row, else None."""
    value = measured(row, key)
    return None if value is None or not math.isfinite(value) else value


def _not_finite(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """A metric of the catalogue is NaN or infinite, which is outside of every band."""
    keys = [key for key in dict.fromkeys([*row, *row.get("nonfinite", ())]) if catalogued(key) is not None]
    names = [key for key in keys if (value := measured(row, key)) is not None and not math.isfinite(value)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Not finite: {', '.join(names[:3])}{more}" if names else None


def _length(row: Mapping[str, Any]) -> float:
    return number(row, "tokens/responses_len_mean") or 0.0


def _constant_reward(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """Equal scores in every batch so far. A reward that varied before may be constant at its best."""
    mean, std, first = number(row, "score/mean"), number(row, "score/std"), number(checks.first or {}, "score/mean")
    if mean is None or std is None or first is None:
        return None
    limit = (METRICS["score/std"].low or 0.0) * max(1.0, abs(first))
    checks._varied |= std > limit or abs(mean - first) > limit
    return None if checks._varied else f"All {number(row, 'run/episodes') or 0:.0f} scores so far are {mean:g}"


def _truncated(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """No response ends, in a run that is meant to have ends, or in which most ended before.

    Free continuations of a text are cut at the limit in healthy runs, such as the demo's.
    """
    share = number(row, "tokens/truncated")
    if share is None:
        return None
    checks._ended |= share < 0.5
    if not (checks.expects_end or checks._ended):
        return None
    length = _length(row)
    return (
        None if (text := checks.outside(row, "tokens/truncated", "high")) is None else f"{text}, at {length:.0f} tokens"
    )


def _above_target(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """A tenth of a run's KL above its band is overshoot of the controller; half is not."""
    return checks.outside(row, "objective/kl", "high", 1.5)


def _collapsed(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    kl, length = number(row, "objective/kl"), _length(row)
    if kl is None or length < _SHORT or kl <= _COLLAPSED * length:
        return None
    return f"objective/kl = {kl:.3g} nats per response, {kl / length:.2f} per token; healthy runs stay below 0.5"


def _entropy_low(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    return None if _length(row) < _SHORT else checks.outside(row, checks.key("policy/entropy"), "low")


def _entropy_high(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """Twice the entropy of the start, and a nat more: a policy that began near 0 may well double it."""
    key = checks.key("policy/entropy")
    value, start = number(row, key), number(checks.first or {}, key)
    return None if value is None or start is None or value < start + 1 else checks.outside(row, key, "high")


def _explained_variance(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    """A value head that has learnt the returns predicts them badly by this measure once they hardly vary any more."""
    key = checks.key("val/var_explained")
    if int(row["step"]) <= METRICS["ppo/val/var_explained"].grace or not is_telling(row, key, checks._spread):
        return None
    return checks.outside(row, key, "low")


def _values(checks: RowChecks, row: Mapping[str, Any]) -> str | None:
    mean, variance = number(row, checks.key("val/mean")), number(row, checks.key("val/var"))
    scores = [abs(score) for name in ("p05", "p95", "mean") if (score := number(row, f"score/{name}")) is not None]
    if mean is None or variance is None or not scores:
        return None
    largest = max(scores) + abs((number(row, "objective/kl") or 0) * (number(row, "objective/kl_coef") or 0))
    size = math.sqrt(mean**2 + variance)
    text = f"Values of ±{size:.3g} (root mean square) for returns of about {largest:.3g}"
    return text if size > _VALUE_FACTOR * (1 + largest) else None


_RULES = (
    # In float16, the loss scale overflows for some steps before it has been lowered far enough.
    _Rule("not-finite", 3, _not_finite),
    _Rule("constant-reward", 3, _constant_reward, _SAMPLES),
    _Rule("truncated", 3, _truncated, _SAMPLES),
    _Rule("kl-above-target", 10, _above_target),
    # Single batches of few samples fall below -1 by chance.
    _Rule("kl-negative", 5, lambda checks, row: checks.outside(row, "objective/kl", "low")),
    _Rule("policy-collapse", 2, _collapsed),
    _Rule("clip-fraction", 5, lambda checks, row: checks.outside(row, checks.key("policy/clipfrac"), "high")),
    _Rule("entropy-collapse", 5, _entropy_low),
    _Rule("entropy-explosion", 3, _entropy_high),
    _Rule("explained-variance", 20, _explained_variance),
    _Rule("value-head-scale", 3, _values),
    _Rule("samples-excluded", 5, lambda checks, row: checks.outside(row, "reward/excluded", "high")),
)
