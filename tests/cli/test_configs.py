"""`trl config init`, `check` and `diff`. C5."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.helpers import write_project
from trl.cli import catalogue
from trl.cli.app import main
from trl.cli.configs import TEMPLATE
from trl.cli.resolve import resolve


def test_init_writes_a_valid_configuration_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "init"]) == 0
    assert "next: trl ppo run.yaml" in capsys.readouterr().out
    assert main(["config", "check", "run.yaml"]) == 0
    assert "settings given, all valid" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text("mine")
    assert main(["config", "init", "run.yaml"]) == 2
    assert "--force" in capsys.readouterr().err and (tmp_path / "run.yaml").read_text() == "mine"
    assert main(["config", "init", "run.yaml", "--force"]) == 0
    assert (tmp_path / "run.yaml").read_text() == TEMPLATE.format(name="run.yaml")
    assert main(["config", "init", "no/such/folder.yaml"]) == 2


def test_the_template_makes_few_optimizer_steps() -> None:
    Path("t.yaml").write_text(TEMPLATE.format(name="t.yaml"))
    config = resolve("ppo", files=["t.yaml"], environment={}).section("ppo")
    assert config.ppo_epochs * config.batch_size // config.samples_per_update == 8


def test_check_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(
        tmp_path, "model: tiny-gpt2-reviews\ndata: review-openings\nreward: rewards.py:polite\ntrain: {step: 3}\n"
    )
    assert main(["config", "check", "run.yaml"]) == 2
    assert "run.yaml:4: train.step is no setting: did you mean steps?" in capsys.readouterr().err
    assert main(["config", "check"]) == 2


def test_diff_of_files_and_runs(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(tmp_path)
    assert main(["config", "diff", "run.yaml", "run.yaml"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    (tmp_path / "other.yaml").write_text((tmp_path / "run.yaml").read_text().replace("3e-4", "1e-4"))
    assert main(["config", "diff", "run.yaml", "other.yaml"]) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["run.yaml", "other.yaml"], ["ppo.learning_rate", "0.0003", "0.0001"]]
    assert main(["config", "diff", str(finished_run / "runs" / "run"), "other.yaml"]) == 1
    assert "ppo.learning_rate" in capsys.readouterr().out
    assert main(["config", "diff", "run.yaml"]) == 2


def test_secrets_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """S9."""
    from trl.cli.configs import shown
    from trl.cli.resolve import Flag

    flag = Flag(
        setting=catalogue.settings()["ppo.tracker_kwargs"], texts=("{wandb: {api_key: sekret-123456}}",), spelling="--x"
    )
    text = shown(resolve("ppo", environment={}, flags=[flag]))
    assert "sekret" not in text and "[redacted]" in text
    Path("a.yaml").write_text("ppo: {tracker_kwargs: {wandb: {api_key: sekret-123456}}}\n")
    Path("b.yaml").write_text("ppo: {seed: 1}\n")
    assert main(["config", "diff", "a.yaml", "b.yaml"]) == 1
    assert "sekret" not in capsys.readouterr().out
