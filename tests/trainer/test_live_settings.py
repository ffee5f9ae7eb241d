"""A configuration that is changed between two steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.conformance.setting import language_model, make_batch, make_trainer, with_value_head
from trl import AdaptiveKLController, FixedKLController


def test_the_learning_rate_counts_from_the_next_step_on() -> None:
    trainer = make_trainer(learning_rate=1e-3)
    trainer.step(*make_batch())
    trainer.config.learning_rate = 0.0
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    stats = trainer.step(*make_batch())
    assert stats["ppo/learning_rate"] == 0.0
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_rate_that_is_changed_on_the_optimizer_stays() -> None:
    trainer = make_trainer(learning_rate=1e-3)
    trainer.optimizer.param_groups[0]["lr"] = 5e-4
    assert trainer.step(*make_batch())["ppo/learning_rate"] == 5e-4


@pytest.mark.parametrize("scheduled", [False, True])
def test_under_an_optimizer_of_the_users_a_changed_rate_gives_a_warning(scheduled: bool) -> None:
    model = with_value_head(language_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) if scheduled else None
    trainer = make_trainer(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    trainer.config.learning_rate = 1.0
    with pytest.warns(UserWarning, match="learning_rate .set by the given optimizer or scheduler.*no effect"):
        assert trainer.step(*make_batch())["ppo/learning_rate"] == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(*make_batch())  # said once


def test_target_and_horizon_reach_the_controller() -> None:
    trainer = make_trainer(horizon=1000.0, target=6.0, learning_rate=0.0)
    trainer.config.target, trainer.config.horizon = 3.0, 80.0
    trainer.step(*make_batch())
    assert isinstance(trainer.kl_ctl, AdaptiveKLController)
    assert (trainer.kl_ctl.target, trainer.kl_ctl.horizon) == (3.0, 80.0)
    assert trainer.kl_ctl.value == pytest.approx(
        0.2 * (1 - 0.2 * 8 / 80)
    )  # a KL of 0 is a fifth or more below the target


def test_a_new_first_coefficient_is_the_coefficient() -> None:
    trainer = make_trainer(learning_rate=0.0)
    trainer.step(*make_batch())
    trainer.config.init_kl_coef = 0.7
    assert trainer.step(*make_batch())["objective/kl_coef"] == 0.7


def test_a_controller_that_stops_adapting_keeps_its_coefficient() -> None:
    trainer = make_trainer(horizon=80.0, learning_rate=0.0)
    trainer.step(*make_batch())
    reached = trainer.kl_ctl.value
    trainer.config.adap_kl_ctrl = False
    for _ in range(2):
        assert trainer.step(*make_batch())["objective/kl_coef"] == reached != 0.2
    assert isinstance(trainer.kl_ctl, FixedKLController)


@pytest.mark.parametrize(("name", "value"), [("dtype", "bfloat16"), ("seed", 5), ("gradient_checkpointing", True)])
def test_what_a_trainer_is_made_of_gives_a_warning(name: str, value: Any) -> None:
    trainer = make_trainer()
    setattr(trainer.config, name, value)
    with pytest.warns(UserWarning, match=f"changing {name} on the configuration .* no effect"):
        trainer.step(*make_batch())
