"""The files and the summary of a run that never took place."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trl.demo.outcome import DemoResult, DemoSettings, HeldOut, Review, StepRow
from trl.demo.report import summary, train, write


def row(number: int) -> StepRow:
    return StepRow(
        step=number, samples=2 * number, positive=0.5, positive_std=0.1, kl=1.0, kl_coef=0.05, response_tokens=7.0,
        entropy=2.0, value_explained=0.1, seconds=0.5,
    )  # fmt: skip


def held_out(positive: float) -> HeldOut:
    reviews = [Review(prompt="the film", response="was fine", positive=positive)]
    return HeldOut(reviews=reviews, positive=positive, kl=1.5, perplexity=20.0, distinct_2=0.75)


SETTINGS = DemoSettings(steps=2, batch_size=2, minibatches=1)


def finished() -> DemoResult:
    return DemoResult(
        settings=SETTINGS, rows=[row(1), row(2)], before=held_out(0.25), after=held_out(0.75), seconds=12.3456
    )


def test_summary() -> None:
    numbers = {"kl": 1.5, "perplexity": 20.0, "distinct_2": 0.75}
    assert summary(finished()) == {
        "seed": 0,
        "steps": 2,
        "seconds": 12.3,
        "interrupted": False,
        "before": {"positive": 0.25, **numbers},
        "after": {"positive": 0.75, **numbers},
        "settings": asdict(SETTINGS),
    }
    stopped = summary(DemoResult(settings=SETTINGS, rows=[row(1)], before=held_out(0.25), interrupted=True))
    assert stopped["steps"] == 1 and stopped["interrupted"] is True and "after" not in stopped


def test_files_of_a_finished_and_of_an_interrupted_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    names = ["report.html", "curves-light.svg", "curves-dark.svg", "summary.json", "reviews.json", "metrics.jsonl"]
    assert write(finished(), tmp_path) == [tmp_path / name for name in names]
    reviews = json.loads((tmp_path / "reviews.json").read_text())
    assert reviews["after"] == [{"prompt": "the film", "response": "was fine", "positive": 0.75}]
    assert json.loads((tmp_path / "summary.json").read_text())["after"]["positive"] == 0.75
    (tmp_path / "metrics.jsonl").unlink()
    assert write(DemoResult(settings=SETTINGS, interrupted=True), tmp_path) == [tmp_path / name for name in names[:-1]]
    assert json.loads((tmp_path / "reviews.json").read_text()) == {}


def test_a_row_is_written_as_soon_as_its_step_is_done(tmp_path: Path) -> None:
    metrics, stream, result = tmp_path / "metrics.jsonl", io.StringIO(), DemoResult(settings=SETTINGS)

    def steps() -> Any:
        yield row(1)
        assert [json.loads(line) for line in metrics.read_text().splitlines()] == [asdict(row(1))]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SimpleNamespace(settings=SETTINGS, steps=steps), result, metrics, stream)  # type: ignore[arg-type]
    assert result.rows == [row(1)]
    assert stream.getvalue().startswith("step 1/2  P(POSITIVE) 0.50  KL  1.00")
