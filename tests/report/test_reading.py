"""Reading a run: which completions a report has room for, and what is damaged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.report.runs import make_run, record
from trl.report import reading
from trl.report.reading import _spread, read_run
from trl.trackers import RunDirectory, completion_steps, is_being_written


def test_steps_are_spread_from_the_first_to_the_last() -> None:
    assert _spread(range(1, 6), 10) == [1, 2, 3, 4, 5]
    chosen = _spread(range(1, 5001), 240)
    assert len(chosen) == len(set(chosen)) == 240 and chosen[0] == 1 and chosen == sorted(chosen)
    assert chosen[-60:] == list(range(4941, 5001))


def test_a_large_batch_keeps_the_samples_that_tell_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MAX_BYTES", 3000)
    path = make_run(tmp_path / "run", steps=1)
    samples = [record(i, "x" * 100, score=float(i % 7)) for i in range(100)]
    samples[50] = record(50, "best", score=99.0)
    samples[60] = record(60, "worst", score=-99.0)
    samples[70] = record(70, "failed", score=None, error="no")
    samples[80] = record(80, "longest", length=999)
    samples[90] = record(90, "with tokens", tokens=True)
    with RunDirectory.open(path) as run:
        run.log_completions(samples, 1)
    kept = read_run(path).completions
    assert {"best", "worst", "failed", "longest", "with tokens"} <= {s["completion"] for s in kept}
    assert 8 < len(kept) < 20 and next(s["prompt_id"] for s in kept if s["completion"] == "x" * 100) == "p0"


def test_token_records_are_bounded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "run", steps=1)
    with RunDirectory.open(path) as run:
        for step in range(1, 41):
            run.log_completions([record(0, "some text", tokens=True)], step)
    whole = sum(len(s["tokens"]) for s in read_run(path).completions)
    monkeypatch.setattr(reading, "_MAX_TOKEN_BYTES", whole // 4)
    with_tokens = [s["step"] for s in read_run(path).completions if s["tokens"]]
    assert len(with_tokens) == 10 and max(b - a for a, b in itertools.pairwise(with_tokens)) <= 4


def test_damaged_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        read_run(tmp_path)
    path = make_run(tmp_path / "run")
    (path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        read_run(path)
    (path / "summary.json").unlink()
    (path / "completions" / "step-00000099.jsonl").write_text("half")
    with pytest.raises(ValueError, match=r"step-00000099\.jsonl is not valid JSON"):
        read_run(path)


FINDING = {"step": 3, "code": "c", "severity": "warning", "title": "one", "evidence": "e", "remedy": "r"}


def test_a_finding_that_is_half_written_is_left_for_later(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", findings=[FINDING | {"title": 1}, FINDING])
    with (path / "findings.jsonl").open("a") as file:
        file.write('{"step": 4, "titl')
    assert [(f.step, f.title) for f in read_run(path).findings] == [(3, "one")]


def test_runs_before_token_records_are_read(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=1)
    (path / "completions" / "step-00000001.parquet").unlink()
    sample = {
        "step": 1,
        "prompt_id": "0",
        "prompt": "a",
        "completion": "b",
        "score": 1.0,
        "length": 1,
        "finish_reason": "",
    }
    (path / "completions" / "step-00000001.jsonl").write_text(json.dumps(sample) + "\n")
    assert completion_steps(path) == [1] and read_run(path).completions == [sample]


def test_a_reader_takes_no_lock(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    assert not is_being_written(path)
    with RunDirectory.open(path) as run:
        assert is_being_written(path)
        read_run(path)
        run.log({"score/mean": 1.0}, 21)
    assert not is_being_written(path)
