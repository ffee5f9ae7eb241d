"""Help lists every setting with its meaning and default."""

from __future__ import annotations

import pytest

from trl.cli import catalogue, help_text
from trl.cli.commands import COMMANDS


@pytest.mark.parametrize("command", ["ppo", "grpo", "resume", "eval"])
def test_every_setting_is_listed(command: str) -> None:
    text = help_text.of_command(COMMANDS[command])
    for path, setting in catalogue.settings().items():
        if setting.section != "grpo" or command == "grpo":
            assert f"  {catalogue.shortest_flag(path)}" in text
    assert max(len(line) for line in text.splitlines()) <= 112


@pytest.mark.parametrize("command", catalogue.STAGES)
def test_every_setting_of_a_stage_is_listed(command: str) -> None:
    text = help_text.of_command(COMMANDS[command])
    assert all(f"  {flag}" in text for flag in catalogue.shortest_flags(command).values())
    assert "\nppo:" not in text and f"\n{catalogue.STAGES[command]}: " in text
    assert max(len(line) for line in text.splitlines()) <= 112


def test_defaults_are_those_of_the_command() -> None:
    def words(command: str) -> str:
        return " ".join(help_text.of_command(COMMANDS[command]).split())

    assert "several. (a whole number) [8]" in words("grpo") and "several. (a whole number) [1]" in words("ppo")
    assert "Passes" in words("ppo") or "passes over each batch. (a whole number) [4]" in words("ppo")
