"""Killed and resumed, and two processes: the same weights as one run that nothing disturbs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import assert_close
from tests.programs import run_program
from trl.trackers import read_metrics, without_times

ROOT = Path(__file__).parents[3]


def run(job: dict[str, Any], *launcher: str, code: int = 0) -> list[dict[str, Any]]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "tests.trainer.offline.preference_job", json.dumps(job)]
    done = run_program(command, cwd=ROOT, env=environment)
    assert done.returncode == code, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"digest')]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto", "reward"])
def test_killed_and_resumed_is_bit_equal(stage: str, tmp_path: Path) -> None:
    job = {"stage": stage, "batch": 2, "loss_type": "kto"}
    (whole,) = run(job | {"out": str(tmp_path / "whole")})
    broken = job | {"out": str(tmp_path / "broken"), "save": True}
    assert run(broken | {"kill_at": 3}, code=-signal.SIGKILL) == []
    (resumed,) = run(broken | {"resume": True})
    assert resumed["digest"] == whole["digest"]
    assert resumed["loss"] == whole["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes"), [("dpo", 1), ("kto", 1), ("reward", 1), ("dpo", 2)])
def test_a_killed_run_directory_is_that_of_a_whole_run(stage: str, processes: int, tmp_path: Path) -> None:
    """A row that the checkpoint cut in two included; of several processes all die."""
    job = {"stage": stage, "batch": 2, "loss_type": "kto", "save": True, "run": True}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone") if processes > 1 else ()
    whole = run(job | {"out": str(tmp_path / "whole")}, *launcher)
    killed = 1 if processes > 1 else -signal.SIGKILL
    assert run(job | {"out": str(tmp_path / "broken"), "kill_at": 3}, *launcher, code=killed) == []
    resumed = run(job | {"out": str(tmp_path / "broken")}, *launcher)
    assert len(resumed) == processes and {row["digest"] for row in resumed} == {whole[0]["digest"]}
    rows = [[without_times(row) for row in read_metrics(tmp_path / name / "run")] for name in ("whole", "broken")]
    assert [row["step"] for row in rows[0]] == [3]
    if processes == 1:
        assert rows[0] == rows[1]
    for key, value in rows[0][0].items():  # sums over two processes are rounded when they are saved
        assert_close(rows[1][0][key], value, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto", "reward"])
def test_two_processes_are_one(stage: str, tmp_path: Path) -> None:
    job = {"stage": stage, "out": str(tmp_path), "loss_type": "apo_zero_unpaired"}
    (alone,) = run(job | {"batch": 4})
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    first, second = run(job | {"batch": 2}, *launcher)
    assert first["digest"] == second["digest"]
    for key in alone.keys() - {"digest", "min_reward", "max_reward"}:
        assert_close(first[key], alone[key], 1e-4)
