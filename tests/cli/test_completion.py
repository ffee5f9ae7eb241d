"""Completion scripts: every command and flag, and syntax that the shells accept."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from trl.cli import completion
from trl.cli.app import main
from trl.cli.commands import COMMANDS


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    dashes = "" if shell == "fish" else "--"
    assert all(f"{dashes}{flag}" in script for flag in ("learning-rate", "lora.r", "dry-run", "samples", "packing"))
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trl re", ["resume", "report", "reward"]),
        ("trl dpo --bet", ["--beta"]),
        ("trl ppo --lora", ["--lora.alpha", "--lora.dropout", "--lora.r", "--lora.target-modules"]),
    ],
)
def test_bash_completes(words: str, expected: list[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    split = words.split()
    program = f"{completion.bash()}\nCOMP_WORDS=({words}); COMP_CWORD={len(split) - 1}; _trl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(expected)
