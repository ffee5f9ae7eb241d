"""The table of bench/under_load.py, and that its programs run what they say."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import under_load

from trl import startup


def test_table_of_medians() -> None:
    results = {"demo": {"default/idle": [1.0, 2.0, 9.0], "default/busy": [4.0, 5.0, 3.0]}}
    assert under_load.table(results).splitlines()[2] == "| demo, default | 2.0 | 4.0 | 2.00 |"


def test_the_candidates_contain_the_choice_and_the_default() -> None:
    assert startup.WAITING in under_load.CANDIDATES.values() and {} in under_load.CANDIDATES.values()
    for program in under_load.PROGRAMS.values():
        compile(program, "program", "exec")
