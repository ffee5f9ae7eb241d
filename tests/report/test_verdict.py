"""What a run's numbers are turned into: state, sentences, departures from the healthy bands."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import make_run, row
from trl.health import NOT_FINITE
from trl.report.reading import Run, read_run
from trl.report.verdict import duration, number, verdict


def judged(path: Path, **options: Any) -> tuple[Run, Any]:
    run = read_run(make_run(path, **options))
    return run, verdict(run)


def test_a_healthy_run(tmp_path: Path) -> None:
    run, found = judged(tmp_path / "run")
    assert (run.ending.state, found.mood, found.departures) == ("finished", "good", [])
    assert found.headline == "Finished at step 20 of 20, 38 s of training"
    assert found.sentences[-1] == "All watched metrics stayed in their healthy bands."


def test_a_metric_that_is_out_now_or_was(tmp_path: Path) -> None:
    rows = [row(s, **{"ppo/policy/clipfrac": 0.4 if s < 6 else 0.1, "objective/kl": 20.0}) for s in range(1, 31)]
    run, found = judged(tmp_path / "run", steps=30, rows=rows)
    by_key = {d.metric.key: d for d in found.departures}
    assert set(by_key) == {"ppo/policy/clipfrac", "objective/kl"} and found.mood == "watch"
    clip, kl = by_key["ppo/policy/clipfrac"], by_key["objective/kl"]
    assert (clip.now, clip.steps, clip.first, clip.last) == (False, 5, 1, 5)
    assert (kl.now, kl.steps) == (True, 30) and "far above its target" in kl.symptom.symptom
    assert clip.sentence == "Outside its healthy band (at most 0.3) in 5 steps, between steps 1 and 5."
    assert found.sentences[-1] == "Outside the healthy band now: KL to the reference."


def test_a_moment_out_of_the_band_and_the_first_steps_do_not_count(tmp_path: Path) -> None:
    rows = [
        row(s, **{"ppo/policy/clipfrac": 0.9 if s in (4, 9) else 0.1, "ppo/val/var_explained": -3.0 if s < 20 else 0.2})
        for s in range(1, 31)
    ]
    _, found = judged(tmp_path / "run", steps=30, rows=rows)
    assert found.departures == [] and found.mood == "good"
    said = "All watched metrics are in their healthy bands now; outside for a moment: Clip fraction (2 steps)."
    assert found.sentences[-1] == said


def test_a_moment_is_told_beside_what_lasted_and_what_may_be_intended(tmp_path: Path) -> None:
    rows = [
        row(s, **{
            "tokens/truncated": 1.0,
            "ppo/policy/clipfrac": 0.9 if s == 1 else 0.1,
            "ppo/policy/approxkl": 0.9 if s < 6 else 0.01,
        })
        for s in range(1, 31)
    ]  # fmt: skip
    _, found = judged(tmp_path / "run", steps=30, rows=rows)
    assert found.mood == "good" and found.sentences[-1] == (
        "All watched metrics are in their healthy bands now, except for what may be intended: Truncated responses; outside for a "
        "while: KL of the update; outside for a moment: Clip fraction (step 1)."
    )


def test_now_is_the_last_quarter_of_a_short_run(tmp_path: Path) -> None:
    rows = [row(s, **{"ppo/policy/clipfrac": 0.4 if s > 15 else 0.1}) for s in range(1, 21)]
    _, found = judged(tmp_path / "run", rows=rows)
    assert found.mood == "watch" and found.sentences[-1] == "Outside the healthy band now: Clip fraction."


def test_the_score_before_training_is_where_evaluations_start(tmp_path: Path) -> None:
    rows = [row(s, **{"eval/score_mean": float(s)}) for s in range(1, 21)]
    sentence = "On held-out prompts the score went from {} to 20 at step 20."
    assert sentence.format("1 at step 1") in judged(tmp_path / "older", rows=rows)[1].sentences
    rows[0]["eval_before/score_mean"] = 0.25
    assert sentence.format("0.25 before training") in judged(tmp_path / "run", rows=rows)[1].sentences


def test_explained_variance_is_judged_where_scores_vary(tmp_path: Path) -> None:
    bad = {"ppo/val/var_explained": -9.0}
    for name, spread in (("solved", 0.0), ("varied", 0.4)):
        rows = [row(s, 50, **({} if s < 30 else bad | {"score/std": spread})) for s in range(1, 51)]
        _, found = judged(tmp_path / name, steps=50, rows=rows)
        keys = [left.metric.key for left in found.departures]
        assert ("ppo/val/var_explained" in keys) == (name == "varied")


def test_a_negative_kl_is_too_low(tmp_path: Path) -> None:
    _, found = judged(tmp_path / "run", rows=[row(s, **{"objective/kl": -4.0}) for s in range(1, 21)])
    assert "clearly negative" in found.departures[0].symptom.symptom


def test_a_metric_that_is_not_finite_is_outside_of_any_band(tmp_path: Path) -> None:
    """Also one without a band, and within the grace of one; scores are missing where no sample has one."""
    lost = {"ppo/policy/entropy": math.nan, "ppo/loss/value": math.inf, "score/mean": math.nan, "unknown": math.nan}
    rows = [row(s, **(lost if s > 17 else {})) for s in range(1, 21)]
    run, found = judged(tmp_path / "run", rows=rows)
    assert run.rows[-1]["ppo/policy/entropy"] is None
    assert {d.metric.key: (d.steps, d.first, d.last) for d in found.departures} == {
        "ppo/policy/entropy": (3, 18, 20),
        "ppo/loss/value": (3, 18, 20),
    }
    for left in found.departures:
        assert left.symptom == NOT_FINITE
    sentence = "Outside its healthy band (any finite number) in 3 steps, between steps 18 and 20."
    assert sentence in [left.sentence for left in found.departures]


@pytest.mark.parametrize(
    ("summary", "events", "state", "mood", "headline"),
    [
        ({"reason": "callback", "target": 50}, (), "finished", "good", "Finished at step 20 of 50, 38 s of training, ended by a callback"),
        ({"reason": "SIGINT", "target": 50}, (), "stopped", "good", "Stopped by SIGINT at step 20 of 50, 38 s of training; run it again with resume='auto' to go on"),
        ({}, ("failed in step 21: ValueError: no\x1b[31m",), "failed", "bad", "Failed in step 21: ValueError: no; the last complete step is 20 of 20, 38 s of training"),
        ({}, ("failed in step 3: OSError: full", "run opened"), "killed", "good", "Stopped without saying why at step 20 of 20, 38 s of training; run it again with resume='auto' to go on"),
    ],
)  # fmt: skip
def test_how_a_run_ended(
    tmp_path: Path, summary: dict[str, Any], events: tuple[str, ...], state: str, mood: str, headline: str
) -> None:
    run, found = judged(tmp_path / "run", summary=summary, events=events)
    assert (run.ending.state, found.mood, found.headline) == (state, mood, headline)


def test_a_run_is_running_while_its_writer_lives(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", summary={})
    (path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    run = read_run(path)
    assert run.ending.state == "running" and verdict(run).headline.startswith(
        "Running: step 20 of 20, 38 s of training; last written"
    )
    (path / ".lock").write_text(f"process 999999999 on {socket.gethostname()}")
    assert read_run(path).ending.state == "killed"


def test_errors_of_the_doctor_make_a_run_bad(tmp_path: Path) -> None:
    finding = {"step": 0, "code": "c", "severity": "error", "title": "t", "evidence": "e", "remedy": "r", "page": "p"}
    assert judged(tmp_path / "run", findings=[finding])[1].mood == "bad"
    assert judged(tmp_path / "warned", findings=[finding | {"severity": "warning"}])[1].mood == "watch"


def test_the_score_stayed_or_fell(tmp_path: Path) -> None:
    flat = [row(s, **{"score/mean": 1.0 + 0.001 * s}) for s in range(1, 21)]
    assert judged(tmp_path / "flat", rows=flat)[1].sentences[0].startswith("The mean score stayed about the same: 1")
    falling = [row(s, **{"score/mean": -float(s)}) for s in range(1, 21)]
    expected = "The mean score fell from −1.5 (first 2 steps) to −19.5 (last 2)."
    assert judged(tmp_path / "falling", rows=falling)[1].sentences[0] == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.031234, "0.0312"), (13.42, "13.4"), (2816.0, "2,816"), (-1.5, "−1.5"), (3e-7, "3e-07"), (0.0003, "0.0003")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (300, "5 min"), (12000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_metric_that_only_notes_something_leaves_the_run_healthy(tmp_path: Path) -> None:
    rows = [row(s, **{"tokens/truncated": 1.0}) for s in range(1, 21)]
    _, found = judged(tmp_path / "run", rows=rows)
    assert found.mood == "good" and [d.metric.key for d in found.departures] == ["tokens/truncated"]
    assert found.sentences[-1].endswith(
        "stayed in their healthy bands, except for what may be intended: Truncated responses."
    )
