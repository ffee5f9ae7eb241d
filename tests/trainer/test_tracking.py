"""What trackers are told of the settings, and that one that is not installed is not left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2
from trl import AutoModelForCausalLMWithValueHead, PPOConfig
from trl.trainer.tracking import check_trackers, settings_to_track


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.tracking.get_available_trackers", list)


@pytest.mark.parametrize(
    ("log_with", "package"),
    [
        ("wandb", "wandb"),
        ("trackio", "trackio"),
        ("comet_ml", "comet-ml"),
        (["dvclive"], "dvclive"),
        ("all", "tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(log_with: Any, package: str, nothing_installed: None) -> None:
    with pytest.raises(ImportError, match=rf"log_with=.*pip install {package}"):
        check_trackers(PPOConfig(log_with=log_with))


def test_nothing_is_started_before(
    make_trainer: Any, nothing_installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No process group, no random numbers, and no folder of another tracker."""
    monkeypatch.setattr("trl.trainer.construction.make_accelerator", None)
    folder = {"logging_dir": str(tmp_path / "logs")}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    before = torch.get_rng_state()
    with pytest.raises(ImportError, match="pip install wandb"):
        make_trainer(model=model, log_with="wandb", project_kwargs=folder, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tmp_path.iterdir())


def test_an_unknown_tracker(nothing_installed: None) -> None:
    with pytest.raises(ValueError, match=r"log_with='wandbb' is not supported; expected one of .*tensorboard"):
        check_trackers(PPOConfig(log_with="wandbb"))
    check_trackers(PPOConfig())


def test_an_installed_tracker_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logging_dir"):
        check_trackers(PPOConfig(log_with="tensorboard"))
    check_trackers(PPOConfig(log_with="tensorboard", project_kwargs={"project_dir": str(tmp_path)}))


def test_settings_are_numbers_and_texts() -> None:
    config = PPOConfig(
        batch_size=8,
        steps=24,
        tracker_kwargs={"wandb": {"name": "first", "api_key": "abc", "token": {"value": "abc"}, "tags": ["a"]}},
        push_to_hub_if_best_kwargs={"repo_id": "me/x", "token": "abc", "private": True},
    )
    told = settings_to_track(config)
    assert told["batch_size"] == 8 and told["total_ppo_epochs"] == 3 and told["learning_rate"] == 1e-5
    assert {name: value for name, value in told.items() if "/" in name} == {
        "tracker_kwargs/wandb/name": "first",
        "tracker_kwargs/wandb/api_key": "[redacted]",
        "tracker_kwargs/wandb/token": "[redacted]",
        "push_to_hub_if_best_kwargs/repo_id": "me/x",
        "push_to_hub_if_best_kwargs/token": "[redacted]",
        "push_to_hub_if_best_kwargs/private": True,
    }
    assert all(isinstance(value, int | float | str) for value in told.values())
