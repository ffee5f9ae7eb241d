"""The managed loop of two gloo processes: one batch, one record, one end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.managed import PROMPTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
         "-m", "tests.trainer.ranks_managed", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, second = sorted(reports, key=lambda report: report["rank"])
    assert first["stopped"] == second["stopped"]  # one process wished it, both ended, with the same weights
    assert first["stopped"][:3] == [2, 16, "callback"]
    assert first["resumed"] == second["resumed"] and first["resumed"][1] == first["whole"] == second["whole"]
    assert first["same"]
    flat = [prompt for step in first["taken"] for prompt in step]
    assert [len(step) for step in first["taken"]] == [8] * 5
    assert all(flat.count(str(i)) == 4 for i in range(10))  # four epochs of ten prompts
    assert first["picky"] == second["picky"] and first["picky"][1] == 12  # of 16 scores
    assert first["drawn"][:4] != first["drawn"][4:]  # to one prompt, from one seed
    assert first["excluded"] == [0.5, 0.0]
    assert "process 1 failed with RewardFailed" in first["broken"] and "on rank 1 alone" in second["broken"]
    assert "already contains a run" in first["again"] and "already contains a run" in second["again"]
    assert first["evaluated"] == second["evaluated"]
    assert [row["prompt"] for row in first["evaluated"]["rows"]] == PROMPTS[:7]
    assert (first["evaluated"]["ties"], first["evaluated"]["difference"]["value"]) == (7, 0.0)
    assert first["found"] == second["found"] == []
    for report in (first, second):
        assert report["unfit"].startswith("UnfitRun: ") and "learning-rate" in report["unfit"]
