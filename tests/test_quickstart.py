"""The README's snippets, as they stand, with the hub's gpt2 replaced by a folder of that name. Warnings are errors."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import forget_modules
from trl import assets
from trl.cli.app import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def folder_named_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(assets.path("tiny-gpt2-reviews"), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command line adds the folder of a reward
    yield
    forget_modules(tmp_path)


def run(heading: str, *changes: tuple[str, str]) -> dict[str, Any]:
    """Runs a snippet; `changes` shorten it, and each must apply."""
    code = dict(SNIPPETS)[heading]
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_every_snippet_is_run_here() -> None:
    assert README.count("```python") == len(SNIPPETS)
    assert [heading for heading, _ in SNIPPETS] == [
        "First run",
        "Your model, your reward",
        "Your own loop",
        "Command line",
    ]


def test_the_file_of_settings_has_the_reward_that_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Command line")["short"](["a"], ["four"]) == [-0.04]
    (tmp_path / "rewards.py").write_text(dict(SNIPPETS)["Command line"], encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "run.yaml").write_text(settings, encoding="utf-8")
    assert main(["ppo", "run.yaml", "--dry-run"]) == 0
    assert "prompts         165" in capsys.readouterr().out


def test_the_first_run_is_offline_and_quiet(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = run("First run", ("steps=24", "steps=2"), ("[:64]", "[:8]"))
    assert not set(names["prompts"]) & set(names["held_out"])
    output = capsys.readouterr().out
    assert "8 prompts; intervals of 95% confidence" in output and "win rate" in output
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_run_gets_better(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """Half a unit of log-odds is a third of the way from an indifferent review to a clearly kind one."""
    names = run("First run", ("set_seed(0)", f"set_seed({seed})"), ("PPOConfig(", f"PPOConfig(seed={seed}, "))
    difference = names["comparison"].difference
    assert difference.low > 0.3 and difference.value > 0.5
    assert "doctor" not in caplog.text  # healthy settings


def test_ones_own_reward() -> None:
    names = run(
        "Your model, your reward",
        ("batch_size=64, mini_batch_size=16", "batch_size=4, mini_batch_size=2"),
        ("=100", "=1"),
    )
    assert names["result"].steps == 1 and Path("runs/polite/model/v_head.safetensors").exists()
    again = run(
        "Your model, your reward",
        ("batch_size=64, mini_batch_size=16", "batch_size=4, mini_batch_size=2"),
        ("=100", "=2"),
    )
    assert again["result"].steps == 2


def test_ones_own_loop() -> None:
    names = run("Your own loop")
    stats, model, reference = names["stats"], names["model"], names["reference"]
    assert [len(response) <= 20 for response in names["responses"]] == [True] * 16
    assert stats["ppo/mean_scores"] == pytest.approx(sum(map(float, names["scores"])) / 16)
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))
    pairs = zip(model.named_parameters(), reference.parameters(), strict=True)
    assert sum(not torch.equal(p, q) for (_, p), q in pairs) > 10
    assert not Path("runs").exists()  # no tracker, no folder
