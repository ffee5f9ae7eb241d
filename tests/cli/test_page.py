"""Every command of docs/how-to/command-line.md runs, in its order, with small numbers."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

from trl.cli.app import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "command-line.md"
SMALL = {
    "TRL_PPO__BATCH_SIZE": "4", "TRL_PPO__MINI_BATCH_SIZE": "2", "TRL_PPO__PPO_EPOCHS": "1", "TRL_TRAIN__STEPS": "1",
    "TRL_GENERATION__MAX_NEW_TOKENS": "4", "TRL_DATA__HELD_OUT": "4",
}  # fmt: skip
CODES = {"trl config diff short.yaml run.yaml": 1}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_every_command_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in SMALL.items():
        monkeypatch.setenv(name, text)
    for block in blocks("python") + blocks("yaml"):
        if named := re.match(r"# (\S+\.(?:py|yaml))\n", block):
            (tmp_path / named[1]).write_text(block)
    monkeypatch.setattr("sys.stdin", io.StringIO("quit\n"))
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 17 and all(line.startswith("trl ") for line in commands)
    for line in commands:
        words = shlex.split(line)[1:]
        if words[:3] == ["config", "init", "sft"]:
            monkeypatch.delenv("TRL_TRAIN__STEPS")  # a setting of PPO's: refused from here on
        if words[0] == "resume" and "--steps" in words:
            monkeypatch.setenv("TRL_TRAIN__STEPS", "1")
            words[words.index("--steps") + 1] = "2"
        code = main(words)
        said = capsys.readouterr()
        assert code == CODES.get(line, 0), f"{line}\n{said.err}"


@pytest.mark.parametrize(
    "page", ["sft", *(pytest.param(page, marks=pytest.mark.slow) for page in ("reward-models", "dpo"))]
)
def test_every_command_on_the_page_of_a_stage(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (PAGE.parents[1] / f"{page}.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 3 and all(line.startswith("trl ") for line in commands)
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"


def test_every_command_on_the_page_of_rlhf(capsys: pytest.CaptureFixture[str]) -> None:
    text = (PAGE.parents[1] / "rlhf.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 8
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "ppo":
            words += ["--steps", "1", "--batch-size", "4", "--mini-batch-size", "2", "--max-new-tokens", "4"]
            words += ["--held-out", "4"]
        elif words[0] != "config":
            words += ["--max-steps", "1"]
        assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"


def test_the_second_configuration_is_valid(tmp_path: Path) -> None:
    from trl.cli import reward_sources
    from trl.cli.resolve import resolve

    (tmp_path / "rewards.py").write_text(blocks("python")[0])
    (tmp_path / "c.yaml").write_text(blocks("yaml")[2])
    found = resolve("ppo", files=["c.yaml"], environment={})
    reward_sources.check(found)
    assert found["reward.weights"] == {"positive": 2.0}
    assert set(found["reward.functions"]) == {"short", "positive"}
