"""peft is optional: every name, loading and a step work in an interpreter without it (`without_peft.py`)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("model"))
    command = [sys.executable, "-W", "ignore", "-m", "tests.compat.without_peft", folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_every_name_loads_without_peft(results: dict[str, Any]) -> None:
    assert results["every_name"] == []


def test_loading_without_peft(results: dict[str, Any]) -> None:
    assert results["loading"] == [False, [1, 2]]


def test_a_step_without_peft(results: dict[str, Any]) -> None:
    assert isinstance(results["step"], float), results["step"]
    assert math.isfinite(results["step"])


def test_old_submodules_are_attributes_from_the_start(results: dict[str, Any]) -> None:
    """`import trl` was enough for `trl.trainer.utils.pad_to_length`; here because it needs a new interpreter."""
    assert results["old_submodules"] == ["trl.trainer.utils", "trl.models.modeling_base"]
