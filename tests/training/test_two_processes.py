"""Two gloo processes with half a batch each do what one process does with all of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import assert_close
from tests.programs import run_program

ROOT = Path(__file__).parents[2]


def run(*launcher: str) -> list[dict[str, Any]]:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = run_program([sys.executable, *launcher, "-m", "tests.training.ranks"], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_two_processes_are_one() -> None:
    (alone,) = run()
    first, second = run("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    assert first == second
    for key, value in alone.items():
        assert_close(first[key], value, 1e-5)
