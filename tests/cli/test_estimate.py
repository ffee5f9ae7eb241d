"""The estimate of --dry-run against what a real trainer has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trl.cli.building as building
from tests.cli.conftest import forget_modules
from trl.cli import catalogue, estimate
from trl.cli.problems import UsageError
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


def lines(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_of_prompts_and_of_the_reward_are_there(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "def graded(prompts, completions, answer, hint=None):\n    return [0.0 for _ in completions]\n"
        "def free(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n"
    )
    good = lines(tmp_path / "good.jsonl", {"prompt": "it was", "answer": "a"}, {"prompt": "the film", "answer": "b"})
    misspelt = lines(tmp_path / "misspelt.jsonl", {"prompt": "it was", "answr": "a"})
    without = lines(tmp_path / "without.jsonl", {"question": "it was", "answer": "a"})

    def estimated(prompts: str, reward: str = "rewards.py:graded", **more: str) -> estimate.Estimate:
        return estimate.estimate("ppo", resolved(data__prompts=prompts, reward__functions=reward, **more))

    assert estimated(good).prompts == 2
    with pytest.raises(
        UsageError, match=r"--x: reward graded needs the column answer: did you mean answr\?; the prompts"
    ):
        estimated(misspelt)
    assert estimated(misspelt, "rewards.py:free").prompts == 1
    with pytest.raises(
        ValueError, match=r"without.jsonl:1 .* has the columns question, answer: one of them must be prompt"
    ):
        estimated(without)
    with pytest.raises(ValueError, match=r"without.jsonl:1 .* has the columns question, answer"):
        estimated(good, data__eval_prompts=without)
    (tmp_path / "rewards.py").write_text("import nothing_of_that_name\ndef graded(prompts, completions): ...\n")
    forget_modules(tmp_path)
    with pytest.raises(UsageError, match="cannot be imported: ModuleNotFoundError"):
        estimated(good)
