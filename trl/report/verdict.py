"""Puts a run into plain sentences: its state, what training achieved, and where metrics left their healthy bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trl.health import NOT_FINITE, Band, Metric, Symptom, catalogued, is_telling, measured
from trl.report.reading import Run, age
from trl.untrusted import one_line

Mood = Literal["good", "watch", "bad", "plain", "empty"]

_RECENT = 20  # steps that "now" means, in a short run a quarter of them
_PATIENCE = 3  # steps out of its band before a metric is a problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A metric outside its healthy band."""

    metric: Metric
    band: Band
    symptom: Symptom
    steps: int
    """Number of steps outside."""
    first: int
    last: int
    now: bool
    """Whether it is outside in most of the last steps."""
    brief: bool = False
    """Whether it was outside in too few steps to matter."""

    @property
    def sentence(self) -> str:
        """When and how often the metric was outside."""
        if self.steps == 1:
            return f"Outside its healthy band ({band_text(self.band)}) at {self.when}."
        when = f"between steps {self.first} and {self.last}"
        return f"Outside its healthy band ({band_text(self.band)}) in {self.when}, {when}."

    @property
    def when(self) -> str:
        """The step, or the number of steps."""
        return f"step {self.first}" if self.steps == 1 else f"{self.steps} steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The head of a report on one run."""

    mood: Mood
    headline: str
    sentences: Sequence[str]
    departures: Sequence[Departure]
    """Those that lasted."""


def verdict(run: Run) -> Verdict:
    """Judges a run by its state, its metrics and the doctor's findings."""
    not_finite = (key for row in run.rows for key in row.get("nonfinite", ()))
    every = [d for key in dict.fromkeys([*run.bands, *not_finite]) if (d := departure(run, key)) is not None]
    departures = [d for d in every if not d.brief]
    now = [d for d in departures if d.now and not d.metric.advisory]
    errors = [f for f in run.findings if f.severity == "error"]
    if run.ending.state == "failed" or errors:
        mood: Mood = "bad"
    elif now or run.findings:
        mood = "watch"
    else:
        mood = "empty" if not run.rows else "plain" if run.offline else "good"
    described = (_loss(run),) if run.offline else (_score(run), _evaluation(run), _kl(run), _health(run, every))
    sentences = [sentence for sentence in described if sentence]
    return Verdict(mood=mood, headline=_headline(run), sentences=sentences, departures=departures)


def departure(run: Run, key: str) -> Departure | None:
    """How a metric left its band, or None if it did not. NaN and infinities are outside of any."""
    band, metric = run.bands.get(key, Band()), catalogued(key)
    if metric is None:
        return None
    points, spread = list[tuple[int, float]](), 0.0
    for row in run.rows:
        value, spread = measured(row, key), max(spread, measured(row, "score/std") or 0.0)
        judged = row["step"] > metric.grace and is_telling(row, key, spread)
        if value is not None and (judged or math.isnan(value)):
            points.append((int(row["step"]), value))
    outside = [(step, value) for step, value in points if not band.holds(value)]
    if not outside:
        return None
    brief = len(outside) < min(_PATIENCE, len(points))
    below = sum(band.low is not None and value < band.low for _, value in outside)
    if 2 * sum(math.isnan(value) for _, value in outside) > len(outside):
        symptom: Symptom | None = NOT_FINITE
    else:
        symptom = metric.too_low if 2 * below > len(outside) else metric.too_high
    if symptom is None:
        return None
    recent = points[-min(_RECENT, max(_PATIENCE, len(points) // 4)) :]
    return Departure(
        metric=metric,
        band=band,
        symptom=symptom,
        steps=len(outside),
        first=outside[0][0],
        last=outside[-1][0],
        now=not brief and 2 * sum(not band.holds(value) for _, value in recent) > len(recent),
        brief=brief,
    )


def band_text(band: Band) -> str:
    """A band in words: "at most 0.3", "0.8 to 1.25"."""
    if band.low is not None and band.high is not None:
        return f"{number(band.low)} to {number(band.high)}"
    if band.low is None and band.high is None:
        return "any finite number"
    return f"at least {number(band.low)}" if band.low is not None else f"at most {number(band.high)}"


def number(value: float | None) -> str:
    """A number with three significant digits: 0.0312, 13.4, 2,816."""
    if value is None:
        return "–"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e7):
        return f"{value:.2g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(decimals, 6)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 5 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _headline(run: Run) -> str:
    step = int(run.rows[-1]["step"]) if run.rows else 0
    of = f" of {run.target:,}" if run.target else ""
    took = f", {duration(_seconds(run))} of training" if run.rows else ""
    progress = f"step {step:,}{of}{took}"
    resume = "resume_from_checkpoint" if run.offline else "resume"
    if run.ending.state == "finished":
        return f"Finished at {progress}" + (", ended by a callback" if run.ending.reason == "callback" else "")
    if run.ending.state == "running":
        return (
            f"Running: {progress}; last written {duration(age(run))} ago" if run.rows else "Running: no step done yet"
        )
    if run.ending.state == "failed":
        return f"F{one_line(run.ending.error)[1:]}; the last complete step is {progress.removeprefix('step ')}"
    if run.ending.state == "stopped":
        return f"Stopped by {one_line(run.ending.reason)} at {progress}; run it again with {resume}='auto' to go on"
    return f"Stopped without saying why at {progress}; run it again with {resume}='auto' to go on"


def _seconds(run: Run) -> float:
    """Time of the steps so far; a row of an offline stage stands for several."""
    steps = [0, *(int(row["step"]) for row in run.rows)]
    times = run.series("time/step")
    return sum(
        seconds * (step - before if run.offline else 1)
        for seconds, before, step in zip(times, steps, steps[1:], strict=False)
        if seconds is not None
    )


def _ends(values: Sequence[float | None]) -> tuple[float, float, int] | None:
    """Means of the first and the last tenth of a series, and the number of values in each."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    count = max(1, len(known) // 10)
    return math.fsum(known[:count]) / count, math.fsum(known[-count:]) / count, count


def _score(run: Run) -> str | None:
    ends = _ends(run.series("score/mean"))
    if ends is None:
        return "No step has a score yet." if not run.rows else None
    first, last, count = ends
    spread = next((v for v in reversed(run.series("score/std")) if v is not None), 0.0)
    change = last - first
    verb = "stayed about the same" if abs(change) < 0.1 * spread else "rose" if change > 0 else "fell"
    where = ("first step", "last") if count == 1 else (f"first {count} steps", f"last {count}")
    joined = f"{number(first)} ({where[0]}) and {number(last)} ({where[1]})"
    if verb.startswith("stayed"):
        return f"The mean score {verb}: {joined}."
    return f"The mean score {verb} from {joined.replace(' and ', ' to ')}."


def _loss(run: Run) -> str | None:
    """First and last loss of an offline stage, in training and in evaluation."""
    parts = []
    for key, where in (("loss", ""), ("eval_loss", " on held-out rows")):
        ends = _ends(run.series(key))
        if ends is not None:
            verb = "fell" if ends[1] < ends[0] else "rose" if ends[1] > ends[0] else "stayed"
            parts.append(f"The loss{where} {verb} from {number(ends[0])} to {number(ends[1])}.")
    return " ".join(parts) or None


def _evaluation(run: Run) -> str | None:
    scores = [(row["step"], v) for row, v in zip(run.rows, run.series("eval/score_mean"), strict=True) if v is not None]
    if not scores:
        return None
    last, end = scores[-1]
    before = next((value for value in run.series("eval_before/score_mean") if value is not None), None)
    if before is None and len(scores) == 1:
        return f"On held-out prompts the score was {number(end)} at step {last}."
    start = f"{number(scores[0][1])} at step {scores[0][0]}" if before is None else f"{number(before)} before training"
    return f"On held-out prompts the score went from {start} to {number(end)} at step {last}."


def _kl(run: Run) -> str | None:
    ends = _ends(run.series("objective/kl"))
    if ends is None:
        return None
    settings = run.config.get("ppo") or {}
    target = settings.get("target") if settings.get("adap_kl_ctrl") and run.algorithm == "ppo" else None
    aim = f", with a target of {number(target)}" if target else ""
    over = "the last step" if ends[2] == 1 else f"the last {ends[2]} steps"
    return f"The policy is {number(ends[1])} nats per response away from the reference, on average over {over}{aim}."


def _health(run: Run, departures: Sequence[Departure]) -> str | None:
    if not run.rows:
        return None
    telling = [d for d in departures if not d.metric.advisory]
    if now := [d.metric.title for d in telling if d.now]:
        return f"Outside the healthy band now: {', '.join(now)}."
    intended = [d.metric.title for d in departures if d.metric.advisory and not d.brief]
    lasting = [d.metric.title for d in telling if not d.brief]
    brief = [f"{d.metric.title} ({d.when})" for d in telling if d.brief]
    sentence = f"All watched metrics {'are' if lasting or brief else 'stayed'} in their healthy bands"
    sentence += " now" if lasting or brief else ""
    sentence += f", except for what may be intended: {', '.join(intended)}" if intended else ""
    sentence += f"; outside for a while: {', '.join(lasting)}" if lasting else ""
    return sentence + (f"; outside for a moment: {', '.join(brief)}." if brief else ".")
