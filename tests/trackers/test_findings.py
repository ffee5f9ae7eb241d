"""Findings and the lines of findings.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl.trackers import Finding, RunDirectory, read_findings


def made(step: int, code: str = "constant-reward", evidence: str = "All 8 scores are 1") -> Finding:
    return Finding(step=step, code=code, severity="warning", title="No signal.", evidence=evidence, remedy="Vary it.")


def test_a_line_is_the_finding(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run") as run:
        assert read_findings(run.path) == []
        run.finding(made(3))
    (line,) = (tmp_path / "run/findings.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 3, "code": "constant-reward", "severity": "warning", "title": "No signal.", "evidence": "All 8 scores are 1",
        "remedy": "Vary it.", "page": "docs/doctor.md#constant-reward",
    }  # fmt: skip
    assert read_findings(tmp_path / "run") == [made(3)]
    assert str(made(3)) == (
        "warning constant-reward (step 3): No signal. All 8 scores are 1. Vary it. See docs/doctor.md#constant-reward"
    )


def test_secrets_and_hidden_characters_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_canary_canary")
    with RunDirectory.create(tmp_path / "run") as run:
        run.finding(made(1, evidence="model at https://hub/hf_canary_canary_canary\nof two lines"))
    text = (tmp_path / "run/findings.jsonl").read_text()
    assert "canary" not in text and text.count("\n") == 1


def test_damage_is_left_out(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run") as run:
        run.finding(made(1))
    path = tmp_path / "run/findings.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"not json\n[1]\n" + whole + b'{"step": 2}\n' + whole[:-9])
    assert read_findings(tmp_path / "run") == [made(1)]


@pytest.mark.parametrize(("step", "kept"), [(3, [1, 3]), (2, [1]), (9, [1, 3, 5]), (0, []), (-1, [])])
def test_a_resumed_run_keeps_those_of_its_steps(tmp_path: Path, step: int, kept: list[int]) -> None:
    """A run that starts over keeps none, not even those of step 0: it may have other settings."""
    with RunDirectory.create(tmp_path / "run") as run:
        for number in (1, 3, 5):
            run.finding(made(number, f"code-{number}"))
        before = (tmp_path / "run/findings.jsonl").read_bytes()
        run.truncate_after(step)
    assert [finding.step for finding in read_findings(tmp_path / "run")] == kept
    if kept == [1, 3, 5]:
        assert (tmp_path / "run/findings.jsonl").read_bytes() == before
