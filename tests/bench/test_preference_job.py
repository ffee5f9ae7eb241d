"""bench/preference_job.py: pairs of reviews, the table, and the job itself on the bundled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import preference_job

from trl import assets


def reviews(path: Path) -> Path:
    lines = [" ".join(f"{name}{i}" for i in range(40)) for name in "abcd"] + ["too short"]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def test_pairs(tmp_path: Path) -> None:
    first, second = preference_job.pairs_of(reviews(tmp_path / "r.jsonl"), 2)
    assert first["prompt"].split() == [f"a{i}" for i in range(16)]
    assert first["chosen"].split()[0] == "a16" and first["rejected"].split()[0] == "b16"
    assert second["chosen"].split()[0] == "b16"


def test_table() -> None:
    def run(pairs: float, step: float) -> list[dict[str, Any]]:
        steps = [{"cycle": i, "step_s": 9.0 if i == 0 else step, "loss": 0.5} for i in range(3)]
        return [*steps, {"pairs_per_s": pairs, "peak_mb": 100.0}]

    rows = preference_job.table({"this library": [run(4, 1.0)], "other": [run(2, 2.0)], "broken": ["Error: no"]})
    assert "| this library | 4.00 | 1.00 | 0.5000 | 100 | 1.00× |" in rows
    assert "| other | 2.00 | 2.00 | 0.5000 | 100 | 2.00× |" in rows
    assert "| broken (Error: no) | | | | | |" in rows


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_job(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    words = ["--alone", "--stage", stage, "--model", assets.path("tiny-gpt2-reviews"), "--steps", "1", "--pairs", "1"]
    words += ["--reviews", str(reviews(tmp_path / "r.jsonl")), "--length", "64"]
    preference_job.job(preference_job.parse(words))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [row.get("cycle") for row in rows] == [0, None]
    assert rows[-1]["pairs_per_s"] > 0
