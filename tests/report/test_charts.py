"""The charts: series, text alternatives and what is drawn of which run."""

from __future__ import annotations

from pathlib import Path

from tests.report.runs import make_run, row
from trl.health import METRICS, STAGE_METRICS
from trl.report.charts import CHARTS, figures, series_of
from trl.report.reading import read_run


def test_charts_draw_the_metrics_of_the_catalogue() -> None:
    of_stages = [chart for chart in CHARTS if chart.keys[0] in STAGE_METRICS]
    others = [chart for chart in CHARTS if chart not in of_stages]
    drawn = {key for chart in others for key in (*chart.keys, *chart.points, *sum(chart.ribbons, ()), chart.main)}
    unwatched = {
        "ppo/loss/policy",
        "eval_before/score_mean",
        "ppo/skipped_updates",
        "run/skipped_batches",
        "run/rollbacks",
    }
    assert drawn == set(METRICS) - unwatched
    assert {chart.keys[0] for chart in of_stages} == set(STAGE_METRICS)
    assert len({chart.id for chart in CHARTS}) == len(CHARTS)


def test_a_figure_says_what_it_shows(tmp_path: Path) -> None:
    rows = [row(1, **{"time/step": 3.0}), row(2, **{"time/step": 5.0}), row(3, **{"time/step": 4.0})]
    by_id = {figure.chart.id: figure for figure in figures([read_run(make_run(tmp_path / "run", steps=3, rows=rows))])}
    time, clip = by_id["time"], by_id["clip"]
    assert time.now == "4 s" and clip.now == "10%"
    assert list(time.descriptions) == ["3 at step 1, 4 at step 3; lowest 3 at step 1, highest 5 at step 2."]
    assert (clip.band, clip.drawing["low"], clip.drawing["high"]) == ("at most 0.3", None, 0.3)
    assert list(time.steps) == [1, 2, 3] and [label for label, _ in time.table][:4] == list(time.chart.labels)
    assert by_id["kl"].drawing["target"] == 6.0 and "components" not in by_id


def test_components_are_drawn_where_there_are_several(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", rows=[row(s, **{"reward/x/mean": 0.5}) for s in range(1, 21)]))
    (figure,) = [figure for figure in figures([run]) if figure.chart.id == "components"]
    assert figure.chart.labels == ("words", "x") and figure.chart.keys == ("reward/words/mean", "reward/x/mean")
    series = series_of(run, [figure.chart])
    assert series["reward/x/mean"] == [0.5] * 20


def test_points_have_five_digits(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=1, rows=[row(1, **{"score/mean": 1.23456789})]))
    assert series_of(run, CHARTS[:1])["score/mean"] == [1.2346]
