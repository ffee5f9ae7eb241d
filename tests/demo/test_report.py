"""The files and the summary of a run that never took place."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from trl.demo.outcome import DemoResult, DemoSettings, HeldOut, Review
from trl.demo.report import summary, write
from trl.trackers import RunDirectory


def held_out(positive: float) -> HeldOut:
    reviews = [Review(prompt="the film", response="was fine", positive=positive)]
    return HeldOut(reviews=reviews, positive=positive, kl=1.5, perplexity=20.0, distinct_2=0.75)


SETTINGS = DemoSettings(steps=2, batch_size=2, minibatches=1)


def finished() -> DemoResult:
    return DemoResult(settings=SETTINGS, steps=2, before=held_out(0.25), after=held_out(0.75), seconds=12.3456)


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
    stopped = summary(DemoResult(settings=SETTINGS, steps=1, before=held_out(0.25), interrupted=True))
    assert stopped["steps"] == 1 and stopped["interrupted"] is True and "after" not in stopped


def test_files_of_a_finished_and_of_an_interrupted_run(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path) as run:
        run.log({"score/mean": 0.5}, step=1)
    names = ["report.html", "demo.json", "reviews.json", "metrics.jsonl", "completions"]
    assert write(finished(), tmp_path) == [tmp_path / name for name in names]
    reviews = json.loads((tmp_path / "reviews.json").read_text())
    assert reviews["after"] == [{"prompt": "the film", "response": "was fine", "positive": 0.75}]
    assert json.loads((tmp_path / "demo.json").read_text())["after"]["positive"] == 0.75
    nothing = tmp_path / "nothing"  # interrupted while the models were loaded
    nothing.mkdir()
    assert write(DemoResult(settings=SETTINGS, interrupted=True), nothing) == [nothing / name for name in names[1:3]]
    assert json.loads((nothing / "reviews.json").read_text()) == {}
