"""Where TRL 0.4.6 was wrong and this library is not: the lines of docs/departures.md that no other test shows."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_t5, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from trl.core import PPODecorators

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
RESPONSES = [torch.tensor([10, 11]), torch.tensor([12, 13, 1])]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0)]


def make_trainer(model: Any = None, **settings: Any) -> PPOTrainer:
    """A trainer of a tiny GPT-2 on batches of two."""
    if model is None:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    config = PPOConfig(**({"batch_size": 2, "mini_batch_size": 2, "ppo_epochs": 1} | settings))
    return PPOTrainer(config, model, None, tiny_tokenizer())


def forbid(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("nothing may be started or asked here")


def test_building_a_config_starts_no_process_and_asks_no_server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess.Popen, "__init__", forbid)
    monkeypatch.setattr(socket.socket, "connect", forbid)
    assert PPOConfig(log_with="wandb", tracker_kwargs={"wandb": {"name": "run"}}).log_with == "wandb"


def test_emptying_the_cache_is_a_matter_of_each_trainer(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool | None] = []

    @contextmanager
    def record(enabled: bool | None = None) -> Iterator[None]:
        asked.append(enabled)
        yield

    monkeypatch.setattr(PPODecorators, "empty_cuda_cache", record)
    trainers = [make_trainer(optimize_cuda_cache=setting) for setting in (True, False)]
    for trainer in trainers:
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert asked == [True, False]
    assert not PPODecorators.optimize_cuda_cache  # what 0.4.6 wrote for the whole process


def test_a_step_needs_no_datasets_library(monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer()
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails from here on
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/mean_scores"] == 0.0


def test_the_first_generated_token_of_an_encoder_decoder_is_trained():
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5(), summary_dropout_prob=0.0)
    trainer = make_trainer(model)
    responses = [torch.cat([torch.tensor([PAD]), response]) for response in RESPONSES]  # the start token first
    inputs = trainer.prepare_model_inputs(QUERIES, responses)
    with torch.no_grad():
        masks = trainer.batched_forward_pass(trainer.model, QUERIES, responses, inputs)[3]
    assert masks.tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("max_grad_norm", [1e-3, None])
def test_max_grad_norm_bounds_the_gradient(max_grad_norm: float | None):
    trainer = make_trainer(max_grad_norm=max_grad_norm)
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    gradients: list[Tensor] = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.cat(gradients).norm()
    assert stats["ppo/grad_norm"] > 1e-2  # before clipping
    assert_close(norm, 1e-3 if max_grad_norm else stats["ppo/grad_norm"])


@pytest.mark.parametrize("lengths", [(1, 1), (1, 3), (0, 2)])
def test_one_token_is_a_response_and_none_is_not(lengths: tuple[int, int]):
    responses = [torch.arange(10, 10 + n) for n in lengths]
    expectation = nullcontext() if min(lengths) else pytest.raises(ValueError, match=r"responses\[0\] is empty")
    with expectation:
        stats = make_trainer().step(QUERIES, responses, SCORES)
        assert stats["tokens/responses_dist"].tolist() == list(lengths)
