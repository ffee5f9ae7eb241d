"""The estimate of --dry-run against what a real trainer has."""

from __future__ import annotations

import pytest

import trl.cli.building as building
from trl.cli import catalogue, estimate
from trl.cli.resolve import Flag, Resolved, resolve


def resolved(**texts: str) -> Resolved:
    texts = {
        "model__name": "tiny-gpt2-reviews", "data__prompts": "review-openings", "reward__functions": "length-penalty",
        "train__steps": "3", "ppo__batch_size": "8", "ppo__mini_batch_size": "2", "generation__max_new_tokens": "10",
    } | texts  # fmt: skip
    flags = [
        Flag(setting=catalogue.settings()[k.replace("__", ".")], texts=(v,), spelling="--x") for k, v in texts.items()
    ]
    return resolve("ppo", environment={}, flags=flags)


@pytest.mark.parametrize(("command", "shared"), [("ppo", 0), ("ppo", 2), ("grpo", 0)])
def test_parameters_are_those_of_the_trainer(command: str, shared: int) -> None:
    settings = resolved(model__shared_layers=str(shared or "null"))
    found = estimate.estimate(command, settings)
    trainer = building.trainer(command, settings, steps=3)
    assert found.parameters == sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert found.trained == trained
    own = {id(p) for p in trainer.model.parameters()}
    assert found.reference == 4 * sum(p.numel() for p in trainer.ref_model.parameters() if id(p) not in own)
    assert found.gradients == 4 * found.trained and found.optimizer == 8 * found.trained


def test_numbers_by_hand() -> None:
    found = estimate.estimate("ppo", resolved(ppo__ppo_epochs="3", ppo__gradient_accumulation_steps="2"))
    # 3 epochs of 8 samples, 2 x 2 for each optimizer step.
    assert (found.optimizer_steps, found.steps, found.samples) == (3 * 8 // 4, 3, 24)
    assert found.tokens_per_step == pytest.approx(8 * (found.prompt_tokens + 10), abs=1)
    assert found.reference == found.weights == 4 * found.parameters  # a copy
    assert estimate.estimate("ppo", resolved(train__steps="null", train__episodes="17")).steps == 3


def test_many_optimizer_steps_are_remarked_on() -> None:
    text = estimate.text("ppo", resolved(ppo__batch_size="256", ppo__mini_batch_size="1"))
    assert "1024 optimizer steps" in text and "remark" in text
    assert "remark" not in estimate.text("ppo", resolved())
