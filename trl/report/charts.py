"""The charts of a report: which series they show, and their text alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.health import catalogued
from trl.report.reading import Run
from trl.report.verdict import Departure, band_text, departure, number
from trl.untrusted import one_line

_TABLE_ROWS = 12  # of a chart's text alternative
_DIGITS = 5  # significant digits of a point


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Series drawn in one picture, under the catalogue's keys."""

    id: str
    group: str
    title: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ()
    ribbons: tuple[tuple[str, str], ...] = ()
    """Pairs of keys between which the area is filled."""
    points: tuple[str, ...] = ()
    """Keys that are measured now and then, drawn as dots."""
    judged: str | None = None
    """Key whose band is shaded; by default the first."""
    shown: str | None = None
    """Key of the number beside the title, which several runs are compared by; by default the first."""
    meaning: str = ""
    """What the chart says about its series; by default, the meaning of the first."""
    stacked: bool = False
    percent: bool = False

    @property
    def main(self) -> str:
        """Key that stands for the chart in a comparison."""
        return self.shown or self.keys[0]


_LOSSES, _PREFERENCES, _MODEL = "Updates", "Preferences", "Model"
# Of the offline stages, whose runs have no keys of the others but those of the machine.
_STAGE_CHARTS = (
    Chart(id="loss", group="Loss", title="Loss", keys=("loss",), labels=("training",), points=("eval_loss",)),
    Chart(
        id="accuracy", group=_PREFERENCES, title="Accuracy", keys=("accuracy",), points=("eval_accuracy",), percent=True
    ),
    Chart(id="margin", group=_PREFERENCES, title="Margin", keys=("margin",), points=("eval_margin",)),
    Chart(
        id="stage-rewards",
        group=_PREFERENCES,
        title="Rewards",
        keys=("mean_reward",),
        ribbons=(("min_reward", "max_reward"),),
    ),
    Chart(
        id="calibration",
        group=_PREFERENCES,
        title="Calibration error",
        keys=("eval_expected_calibration_error",),
        percent=True,
    ),
    Chart(
        id="accuracies",
        group=_PREFERENCES,
        title="Accuracy",
        keys=("rewards/accuracies",),
        points=("eval_rewards/accuracies",),
        percent=True,
    ),
    Chart(
        id="margins",
        group=_PREFERENCES,
        title="Margin",
        keys=("rewards/margins",),
        points=("eval_rewards/margins",),
    ),
    Chart(
        id="implicit-rewards",
        group=_PREFERENCES,
        title="Implicit rewards",
        keys=("rewards/chosen", "rewards/rejected"),
        labels=("chosen", "rejected"),
    ),
    Chart(
        id="logps",
        group=_PREFERENCES,
        title="Log-probabilities of the responses",
        keys=("logps/chosen", "logps/rejected"),
        labels=("chosen", "rejected"),
    ),
    Chart(id="kto-kl", group=_PREFERENCES, title="KL estimate", keys=("kl",)),
    Chart(
        id="token-accuracy",
        group=_MODEL,
        title="Token accuracy",
        keys=("mean_token_accuracy",),
        points=("eval_mean_token_accuracy",),
        percent=True,
    ),
    Chart(id="stage-entropy", group=_MODEL, title="Entropy", keys=("entropy",), points=("eval_entropy",)),
    Chart(id="stage-gradient", group=_LOSSES, title="Gradient norm", keys=("grad_norm",)),
    Chart(id="stage-rate", group=_LOSSES, title="Learning rate", keys=("learning_rate",)),
    Chart(id="stage-speed", group="Machine", title="Throughput", keys=("time/train_tokens_per_second",)),
)
CHARTS = (
    Chart(
        id="score",
        group="Reward",
        title="Score",
        keys=("score/mean", "score/median"),
        labels=("mean", "median"),
        ribbons=(("score/p05", "score/p95"), ("score/p25", "score/p75")),
        points=("eval/score_mean",),
    ),
    Chart(id="score-std", group="Reward", title="Spread of the scores", keys=("score/std",)),
    Chart(
        id="errors",
        group="Reward",
        title="Samples without a score",
        keys=("reward/errors", "reward/excluded"),
        meaning="Share of samples without a score: the reward failed, or returned None.",
        labels=("with an error", "left out"),
        percent=True,
    ),
    Chart(id="kl", group="Policy", title="KL to the reference", keys=("objective/kl",), points=("eval/kl",)),
    Chart(id="kl-coef", group="Policy", title="KL coefficient", keys=("objective/kl_coef",)),
    Chart(id="entropy", group="Policy", title="Entropy", keys=("ppo/policy/entropy",)),
    Chart(id="length", group="Policy", title="Response length", keys=("tokens/responses_len_mean",)),
    Chart(id="truncated", group="Policy", title="Truncated responses", keys=("tokens/truncated",), percent=True),
    Chart(id="clip", group=_LOSSES, title="Clip fraction", keys=("ppo/policy/clipfrac",), percent=True),
    Chart(id="ratio", group=_LOSSES, title="Probability ratio", keys=("ppo/policy/mean_ratio",)),
    Chart(id="step-kl", group=_LOSSES, title="KL of the update", keys=("ppo/policy/approxkl",)),
    Chart(id="value", group=_LOSSES, title="Value loss", keys=("ppo/loss/value",)),
    Chart(id="explained", group=_LOSSES, title="Explained variance", keys=("ppo/val/var_explained",)),
    Chart(id="gradient", group=_LOSSES, title="Gradient norm", keys=("ppo/grad_norm",)),
    Chart(id="rate", group=_LOSSES, title="Learning rate", keys=("ppo/learning_rate",)),
    *_STAGE_CHARTS,
    Chart(id="speed", group="Machine", title="Throughput", keys=("time/tokens_per_second",)),
    Chart(
        id="time",
        group="Machine",
        title="Where the time goes",
        keys=("time/sample", "time/score", "time/learn", "time/eval"),
        labels=("sampling", "scoring", "learning", "evaluation"),
        shown="time/step",
        meaning="Seconds of a step by what they were spent on.",
        stacked=True,
    ),
    Chart(id="memory", group="Machine", title="Peak memory", keys=("memory/peak_mb",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with what a page says about it."""

    chart: Chart
    meaning: str
    unit: str
    now: str
    """Last value of the first run."""
    band: str
    """Healthy band of the first run in words; "" without one."""
    reason: str
    departure: Departure | None
    descriptions: Sequence[str]
    """A sentence per run, for readers who do not see the picture."""
    steps: Sequence[int]
    table: Sequence[tuple[str, Sequence[str]]]
    """Label and values at `steps`, of the first run."""
    drawing: dict[str, Any] = field(default_factory=dict)
    """What the page's script needs."""


def figures(runs: Sequence[Run]) -> list[Figure]:
    """The charts for which a run has data."""
    present = {key for run in runs for row in run.rows for key in row}
    charts = [*CHARTS[:1], *_component_charts(present), *CHARTS[1:]]
    return [_figure(chart, runs) for chart in charts if _has_data(chart, runs, present)]


def _has_data(chart: Chart, runs: Sequence[Run], present: set[str]) -> bool:
    drawn = {run.keyed(key) for run in runs for key in chart.keys}
    return bool(drawn & present) and any(run.keyed(chart.main) in present for run in runs)


def series_of(run: Run, charts: Sequence[Chart]) -> dict[str, list[float | None]]:
    """Rounded series of a run by the catalogue's keys, for the page's script."""
    keys = dict.fromkeys(key for chart in charts for key in _all_keys(chart))
    result = {key: run.series(run.keyed(key)) for key in keys}
    return {
        key: [None if value is None else float(f"{value:.{_DIGITS}g}") for value in values]
        for key, values in result.items()
        if any(value is not None for value in values)
    }


def _all_keys(chart: Chart) -> list[str]:
    return list(
        dict.fromkeys([*chart.keys, *(key for pair in chart.ribbons for key in pair), *chart.points, chart.main])
    )


def _component_charts(present: set[str]) -> list[Chart]:
    names = sorted(key[len("reward/") : -len("/mean")] for key in present if _is_component(key))
    if len(names) < 2:  # one component is the score
        return []
    labels = tuple(one_line(name) for name in names)
    keys = tuple(f"reward/{name}/mean" for name in names)
    meaning = "Mean of each component of the reward, unweighted."
    return [
        Chart(
            id="components", group="Reward", title="Reward components, mean", keys=keys, labels=labels, meaning=meaning
        )
    ]


def _is_component(key: str) -> bool:
    return key.startswith("reward/") and key.endswith("/mean") and len(key) > len("reward//mean")


def _figure(chart: Chart, runs: Sequence[Run]) -> Figure:
    first = runs[0]
    judged = first.keyed(chart.judged or chart.keys[0])
    metric = catalogued(chart.keys[0])
    band = first.bands.get(judged)
    shown = catalogued(chart.main)
    last = next((v for v in reversed(first.series(first.keyed(chart.main))) if v is not None), None)
    rows = first.rows
    picked = sorted({round(i * (len(rows) - 1) / (_TABLE_ROWS - 1)) for i in range(_TABLE_ROWS)}) if rows else []
    table = []
    for label, key in zip(_labels(chart), _all_keys(chart), strict=True):
        values = first.series(first.keyed(key))
        table.append((label, [number(values[i]) for i in picked]))
    names = ["" if len(runs) == 1 else f"{run.name}: " for run in runs]
    return Figure(
        chart=chart,
        meaning=chart.meaning or (metric.meaning if metric else ""),
        unit=metric.unit if metric and metric.unit != "share" else "",
        now=_with_unit(last, chart, shown.unit if shown else ""),
        band="" if band is None else band_text(band),
        reason="" if band is None else band.reason,
        departure=departure(first, judged),
        descriptions=[name + _description(chart, run) for name, run in zip(names, runs, strict=True)],
        steps=[int(rows[i]["step"]) for i in picked],
        table=table,
        drawing={
            "id": chart.id,
            "keys": chart.keys,
            "main": chart.main,
            "labels": chart.labels or [chart.title],
            "ribbons": chart.ribbons,
            "points": chart.points,
            "stacked": chart.stacked,
            "percent": chart.percent,
            "low": None if band is None else band.low,
            "high": None if band is None else band.high,
            "target": _target(first) if chart.id == "kl" else None,
        },
    )


def _labels(chart: Chart) -> list[str]:
    names = [*(chart.labels or (chart.title,))]
    for key in _all_keys(chart)[len(names) :]:
        metric = catalogued(key)
        names.append(metric.title if metric else "evaluation" if key.startswith("eval_") else key)
    return names


def _with_unit(value: float | None, chart: Chart, unit: str) -> str:
    if value is not None and chart.percent:
        return f"{100 * value:.0f}%"
    return f"{number(value)} {unit}".strip() if unit != "share" else number(value)


def _target(run: Run) -> float | None:
    settings = run.config.get("ppo") or {}
    return settings.get("target") if settings.get("adap_kl_ctrl") and run.algorithm == "ppo" else None


def _description(chart: Chart, run: Run) -> str:
    values = [(row["step"], v) for row, v in zip(run.rows, run.series(run.keyed(chart.main)), strict=True)]
    known = [(step, value) for step, value in values if value is not None]
    if not known:
        return "no values."
    low, high = (pick(known, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{number(known[0][1])} at step {known[0][0]}, {number(known[-1][1])} at step {known[-1][0]}; lowest "
        f"{number(low[1])} at step {low[0]}, highest {number(high[1])} at step {high[0]}."
    )
