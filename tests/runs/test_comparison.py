"""`trainer.evaluate`: trained against base, on the same prompts with the same random numbers."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_tokenizer
from tests.trainer.managed import GENERATION, HELD_OUT, PROMPTS, bits, fresh, run, words
from trl import PPOConfig
from trl.algorithms import grpo
from trl.functional.intervals import Estimate
from trl.rewards import as_reward
from trl.runs.comparison import _compared, _shown
from trl.runs.evaluation import NothingScored, ScoredResponse
from trl.trainer import OnlineTrainer


def letters(prompts: Any, completions: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("case", ["plain sgd", "lora", "seq2seq"])
def test_before_training_policy_and_base_say_the_same(case: str) -> None:
    """So every difference is 0, whatever the reward."""
    result = fresh(case).evaluate(PROMPTS, words, generation=GENERATION)
    assert result.prompts == len(PROMPTS) == result.ties and result.excluded == 0
    assert all(row.trained == row.base and row.trained_score == row.base_score for row in result.rows)
    assert (result.difference.value, result.win_rate.value) == (0.0, 0.5)
    assert abs(result.kl.value) < 1e-5
    assert [row.prompt for row in result.rows] == PROMPTS


def test_the_base_is_the_reference_and_the_policy_the_policy() -> None:
    """A policy that was made to write w10 only; its reference writes what it wrote before."""
    trainer = fresh("plain sgd")
    before = trainer.evaluate(HELD_OUT, letters, generation=GENERATION)
    head = trainer.model.pretrained_model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([10]), 50.0), requires_grad=False)
    after = trainer.evaluate(HELD_OUT, letters, generation=GENERATION)
    assert {row.trained for row in after.rows} == {"w10 w10 w10 w10 w10"}
    assert [row.base for row in after.rows] == [row.base for row in before.rows] == [row.trained for row in before.rows]
    wanted = [float(len("w10 w10 w10 w10 w10")) - len(row.base) for row in after.rows]
    assert_close(after.difference.value, sum(wanted) / 3)
    assert after.wins == sum(d > 0 for d in wanted) and after.losses == sum(d < 0 for d in wanted)
    assert after.kl.value > 10 and after.kl_per_token == pytest.approx(after.kl.value / 5)
    assert (after.trained.length, after.trained.truncated) == (5.0, 1.0)


@pytest.mark.parametrize("case", ["full", "lora", "seq2seq"])
def test_an_evaluation_changes_nothing(case: str) -> None:
    trainer = fresh(case)
    run(trainer, steps=1)

    def noisy(prompts: Any, completions: Any) -> Any:
        return [random.random() + np.random.rand() + float(torch.rand(())) for _ in prompts]

    before, modes = bits(trainer), [m.training for m in trainer.model.modules()]
    generators = random.getstate(), torch.get_rng_state().tolist()
    first = trainer.evaluate(HELD_OUT, noisy, generation=GENERATION)
    second = trainer.evaluate(HELD_OUT, noisy, generation=GENERATION)
    assert first == second != trainer.evaluate(HELD_OUT, noisy, generation=GENERATION, seed=1)
    assert bits(trainer) == before and [m.training for m in trainer.model.modules()] == modes
    assert (random.getstate(), torch.get_rng_state().tolist()) == generators


def test_prompts_without_a_score_are_excluded_and_counted() -> None:
    def picky(prompts: Any, completions: Any) -> list[Any]:
        if "w53 w54 w55" in prompts:
            raise KeyError("w53")
        return [None if prompt == "w52" else 1.0 for prompt in prompts]

    trainer = fresh("plain sgd", batch_size=2)  # so that the third prompt is a batch of its own
    result = trainer.evaluate(["w50 w51", "w52", "w53 w54 w55"], picky, generation=GENERATION)
    assert (result.prompts, result.excluded, result.trained.score.value) == (3, 2, 1.0)
    assert [row.trained_score for row in result.rows] == [1.0, None, None]
    assert result.rows[1].error is None and "w53" in (result.rows[2].error or "")
    assert "2 excluded for want of a score" in str(result)
    with pytest.raises(NothingScored, match=r"none of 1 prompts has a score for every response; first error: .*w53"):
        trainer.evaluate(["w53 w54 w55"], picky, generation=GENERATION)


def test_a_built_reward_keeps_its_way_with_failures() -> None:
    result = fresh("plain sgd").evaluate(
        HELD_OUT, as_reward(lambda prompts, completions: [2.0] * len(prompts)), generation=GENERATION
    )
    assert result.trained.score.value == 2.0
    mix = {"one": lambda prompts, completions: [1.0] * len(prompts), "half": lambda prompts, completions: [0.5] * 3}
    assert fresh("plain sgd").evaluate(HELD_OUT, mix, generation=GENERATION).trained.score.value == 1.5


def test_an_algorithm_without_a_reference_is_evaluated_alone() -> None:
    config = PPOConfig(batch_size=4, mini_batch_size=2)
    trainer = OnlineTrainer(config, tiny_gpt2(), tokenizer=tiny_tokenizer(), algorithm=grpo(kl_coef=0))
    assert not trainer._trl_uses_reference
    result = trainer.evaluate(HELD_OUT, words, generation=GENERATION)
    assert (result.base, result.difference, result.win_rate, result.kl) == (None, None, None, None)
    assert result.trained.score.value == pytest.approx(sum(row.trained_score for row in result.rows) / 3)
    assert "no reference model, so the trained policy alone" in str(result)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_table_and_the_json() -> None:
    trainer = fresh("plain sgd")
    result = trainer.evaluate(HELD_OUT[:1], words, generation=GENERATION)  # one prompt: no interval
    as_json = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert as_json["trained"]["score"]["low"] is None and as_json["rows"][0]["prompt"] == HELD_OUT[0]
    lines = str(result).splitlines()
    assert lines[0] == "1 prompts; intervals of 95% confidence"
    assert [line.split()[0] for line in lines[1:5]] == ["trained", "score", "tokens", "truncated"]
    assert lines[5].startswith("win rate 50% [") and lines[5].endswith("0 wins, 0 losses, 1 ties, counted half")
    assert lines[6].startswith("KL to the base ")


def test_numbers_have_as_many_digits_as_their_intervals_are_worth() -> None:
    def shown(value: float, low: float, high: float, sign: str = "") -> str:
        return _shown(Estimate(value=value, low=low, high=high), sign)

    assert shown(0.99431, 0.81702, 1.17161) == "0.994 [0.817, 1.172]"
    assert shown(0.125, 0.003855, 0.24612) == "0.125 [0.004, 0.246]"
    assert shown(1.1869, 0.9308, 1.4431, "+") == "+1.187 [+0.931, +1.443]"
    assert shown(4321.9, 4105.3, 4538.5) == "4322 [4105, 4538]"
    assert shown(1.0, 1.0, 1.0) == "1 [1, 1]" and shown(0.5, math.nan, math.nan) == "0.5 [nan, nan]"


def test_a_difference_that_may_be_chance_is_called_so() -> None:
    def response(score: float) -> ScoredResponse:
        return ScoredResponse(score=score, kl=0.0, length=1, finished=True)

    base = [response(score) for score in (0.0, 1.0, 0.0, 1.0)]
    chance = str(_compared([response(score) for score in (1.0, 0.0, 0.1, 1.0)], base, 0.95))
    clear = str(_compared([response(score) for score in (3.0, 4.1, 3.0, 4.0)], base, 0.95))
    assert "it may be chance" in chance and "chance" not in clear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 95}, "confidence=95 must lie between 0 and 1"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens=0 must be"),
        ({"generation": {"max_new_tokens": 64}}, "leaves no room for a prompt"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": None}, "needs at least one prompt"),
        ({"reward": 3}, "expected a function"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh("plain sgd").evaluate(**({"prompts": HELD_OUT, "reward": words, "generation": GENERATION} | arguments))
