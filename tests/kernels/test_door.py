"""The off switch of the kernels, and the one way in which a forward takes the place of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_close
from trl.kernels.door import SWITCH, kernels_enabled, replaced_forwards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("", True), ("on", True), ("off", False)])
def test_the_switch(value: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(SWITCH, value)
    assert kernels_enabled.__wrapped__() is enabled


@pytest.mark.parametrize("value", ["0", "OFF", "false", " off"])
def test_any_other_value_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, value)
    with pytest.raises(ValueError, match=f"TRL_KERNELS={value!r} in the environment must be 'on', 'off' or empty"):
        kernels_enabled.__wrapped__()


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels_enabled()
    monkeypatch.setenv(SWITCH, "off" if before else "on")
    assert kernels_enabled() is before


def test_modules_get_back_the_forward_that_they_had() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    theirs = second.forward = lambda x: x + 1  # type: ignore[method-assign,assignment]
    x = torch.zeros(1, 2)
    with replaced_forwards({first: lambda x: x + 2, second: lambda x: x + 3}):
        with replaced_forwards({first: lambda x: x + 4}):
            assert first(x)[0, 0] == 4
        with pytest.raises(ZeroDivisionError), replaced_forwards({first: lambda x: x + 5}):
            raise ZeroDivisionError
        assert (first(x)[0, 0], second(x)[0, 0]) == (2, 3)
    assert "forward" not in vars(first) and second.forward is theirs
    assert torch.equal(first(x)[0], first.bias)


def test_plain_code_says_the_same_and_replaces_nothing() -> None:
    command = [sys.executable, "-m", "tests.kernels.one_step", "on", "off"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    on, off = map(json.loads, done.stdout.splitlines())
    assert on["replaced"] and on["attention"] == ["trl_decoding", "trl_packed"]
    assert off["replaced"] == off["attention"] == []
    assert on["bfloat16"]["without_gradient"] > off["bfloat16"]["without_gradient"] == 0
    assert on["float32"]["responses"] == off["float32"]["responses"]
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-3)):
        compare(on[dtype]["stats"], off[dtype]["stats"], tolerance)


def compare(quick: dict[str, Any], plain: dict[str, Any], tolerance: float) -> None:
    assert quick.keys() == plain.keys() and len(plain) > 20
    assert plain["ppo/loss/total"] != 0 and plain["ppo/policy/approxkl"] > 0
    for name, value in plain.items():
        assert_close(quick[name], value, tolerance)
