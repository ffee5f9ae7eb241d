"""A response mask of zeros leaves a sample out: what is left is the step of a smaller batch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_t5
from tests.trainer.conftest import weights_of
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

SETTINGS = {"use_score_scaling": True, "use_score_norm": True, "whiten_rewards": True, "horizon": 20, "ppo_epochs": 2}


def masks_of(responses: list[Any], left_out: int) -> list[Any]:
    return [torch.full_like(r, int(i != left_out)) for i, r in enumerate(responses)]


@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("denominator", ["minibatch", "batch"])
def test_a_left_out_sample_changes_nothing(make_trainer: Any, make_batch: Any, seq2seq: bool, denominator: str) -> None:
    kind = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    model = kind.from_pretrained(tiny_t5() if seq2seq else tiny_gpt2(), summary_dropout_prob=0.0)
    queries, responses, scores = make_batch(4, seq2seq=seq2seq)
    scores[2] = torch.tensor(1e6)  # would be seen anywhere
    outcomes = []
    for rows in ([0, 1, 2, 3], [0, 1, 3]):
        own = copy.deepcopy(model)
        trainer = make_trainer(
            model=own, optimizer=torch.optim.SGD(own.parameters(), lr=0.1), batch_size=len(rows),
            mini_batch_size=len(rows), loss_denominator=denominator, **SETTINGS,
        )  # fmt: skip
        with torch.no_grad():  # away from the reference, so that there is a KL to be seen
            torch.manual_seed(3)
            for parameter in trainer.model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        masks = masks_of(responses, 2) if len(rows) == 4 else None
        stats = trainer.step([queries[i] for i in rows], [responses[i] for i in rows], [scores[i] for i in rows], masks)
        outcomes.append((trainer, stats))
    (masked, stats), (smaller, expected) = outcomes
    assert abs(expected["objective/kl"]) > 0.01
    for name, value in expected.items():
        if isinstance(value, float) and "time/" not in name and "memory/" not in name and "tokens/" not in name:
            assert_close(stats[name], value)
    assert_close(masked.kl_ctl.value, smaller.kl_ctl.value, tol=1e-9)
    assert_close([masked.score_moments.mean, masked.score_moments.std, masked.score_moments.count],
                 [smaller.score_moments.mean, smaller.score_moments.std, 3.0])  # fmt: skip
    moved = weights_of(smaller)
    for name, weight in weights_of(masked).items():
        assert_close(weight, moved[name])
    assert any(not torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in moved.items())


def test_a_minibatch_of_left_out_samples_is_no_optimizer_step(make_trainer: Any, make_batch: Any) -> None:
    """Adam would move the weights by its momentum on a gradient of zeros."""
    trainer = make_trainer(mini_batch_size=1, ppo_epochs=3)
    queries, responses, scores = make_batch(4)
    trainer.step(queries, responses, scores)
    taken = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    stats = trainer.step(queries, responses, scores, masks_of(responses, 1))
    assert len(taken) == 3 * 3
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))


def test_a_subclass_with_its_own_loss_steps_as_often(make_trainer: Any, make_batch: Any) -> None:
    from trl import PPOTrainer

    class Own(PPOTrainer):
        def loss(self, *args: Any) -> Any:
            return super().loss(*args)

    trainer = make_trainer(trainer_class=Own, mini_batch_size=1, ppo_epochs=1)
    taken: list[int] = []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: taken.append(1))
    queries, responses, scores = make_batch(4)
    trainer.step(queries, responses, scores, masks_of(responses, 1))
    assert len(taken) == 3


def test_the_best_score_is_that_of_samples_that_count(
    make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "x/y"})
    monkeypatch.setattr(trainer, "push_to_hub", lambda **kwargs: None)
    queries, responses, _ = make_batch(4)
    scores = [torch.tensor(float(i)) for i in (1, 1, 100, 1)]
    trainer.step(queries, responses, scores, masks_of(responses, 2))
    assert trainer._trl_highest_score == 1.0
