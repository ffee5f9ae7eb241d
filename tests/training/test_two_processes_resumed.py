"""Checkpoints and troubles of two gloo processes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.programs import run_program

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_resume_to_the_bit_and_share_their_troubles(tmp_path: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    done = run_program(
        [sys.executable, *launcher, "-m", "tests.training.ranks_resumed", str(tmp_path)], cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, second = sorted(reports, key=lambda report: report["rank"])
    for report in (first, second):
        assert report["resumed"]["same"] and report["resumed"]["step"] == 1
        assert report["resumed"]["own generators"]
        for accumulation, troubles in zip((1, 2), report["troubles"]):
            assert troubles["microbatch"] == 1
            assert troubles["skipped"] == [accumulation / 4, 0.0]  # one of the minibatches of two epochs
    assert first["resumed"]["end"] == second["resumed"]["end"]
    assert first["troubles"] == second["troubles"]
    assert "the checkpoint of step 0" in first["failed"]
    assert second["failed"].startswith("process 0 failed with CheckpointError: the checkpoint of step 0")
