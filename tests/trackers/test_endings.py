"""What state a run is in, of real runs and of made-up folders; `trl runs` and the report say the same."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.managed import fresh, run
from trl import TrainCallback
from trl.cli.run_table import read_run as row_of
from trl.report.reading import read_run
from trl.trackers import Ending, RunDirectory, read_ending


def folder(
    path: Path, *, steps: int = 2, reason: str | None = None, events: tuple[str, ...] = (), lock: bool = False
) -> Path:
    with RunDirectory.create(path) as made:
        for step in range(1, steps + 1):
            made.log({"score/mean": 0.5}, step)
        for event in events:
            made.event(event)
        if reason is not None:
            made.write_summary({"reason": reason})
    if lock:
        (path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return path


FAILED = "failed in step 3: ValueError: no"


@pytest.mark.parametrize(
    ("made", "state", "error"),
    [
        ({"steps": 0}, "new", ""),
        ({}, "killed", ""),
        ({"lock": True}, "running", ""),
        ({"reason": "steps"}, "finished", ""),
        ({"reason": "callback"}, "finished", ""),
        ({"reason": "SIGINT"}, "stopped", ""),
        ({"reason": "SIGTERM", "lock": True}, "running", ""),  # being resumed
        ({"events": (FAILED,)}, "failed", FAILED),
        ({"events": (FAILED,), "steps": 0}, "failed", FAILED),
        ({"events": (FAILED, "the disk is full")}, "failed", FAILED),  # whatever was said after it
        ({"events": (FAILED, "run opened")}, "killed", ""),  # resumed, and killed then
        (
            {"events": (FAILED,), "reason": "steps"},
            "finished",
            "",
        ),  # by a callback at the end, or in a resumption refused
        ({"events": (FAILED,), "reason": "SIGINT"}, "stopped", ""),
        ({"events": ("x: failed in step 3: no",)}, "killed", ""),
    ],
)
def test_states(tmp_path: Path, made: dict[str, Any], state: str, error: str) -> None:
    path = folder(tmp_path / "run", **made)
    found = read_ending(path)
    assert (found.state, found.error) == (state, error)
    assert read_run(path).ending == found
    assert (row_of(path).state, row_of(path).note) == (state, error)


def test_runs_end_as_they_say(tmp_path: Path) -> None:
    def failing(prompts: Any, completions: Any) -> list[float]:
        raise OSError("no reward today")

    class Stop(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> bool:
            return True

    run(fresh("plain sgd"), steps=1, run_dir=tmp_path / "steps")
    run(fresh("plain sgd"), steps=3, run_dir=tmp_path / "callback", callbacks=[Stop()])
    with pytest.raises(Exception, match="no reward today"):
        run(fresh("plain sgd"), reward=failing, run_dir=tmp_path / "failed")
    assert read_ending(tmp_path / "steps") == Ending(state="finished", reason="steps")
    assert read_ending(tmp_path / "callback") == Ending(state="finished", reason="callback")
    failed = read_ending(tmp_path / "failed")
    assert failed.state == "failed" and failed.error.startswith("failed in step 1: RewardFailed: ")


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "run")
    (path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        read_ending(path)
    assert "summary.json is not valid JSON" in row_of(path).note
