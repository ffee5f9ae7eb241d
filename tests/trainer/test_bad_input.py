"""Bad input: a ValueError that names the value and the remedy, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_tokenizer
from tests.trainer.conftest import weights_of
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

T = torch.tensor

BAD_STEPS: dict[str, tuple[Callable[[list, list, list], Any], str]] = {
    "queries not a list": (lambda q, r, s: (T([[3, 4]] * 4), r, s), "queries must be a list of tensors, not Tensor"),
    "a query not a tensor": (lambda q, r, s: ([[3, 4], *q[1:]], r, s), r"queries\[0\] must be a tensor, not list"),
    "too few responses": (lambda q, r, s: (q, r[:3], s), "responses has 3 elements; expected batch_size=4"),
    "no sample": (lambda q, r, s: ([], [], []), "queries has 0 elements; expected batch_size=4"),
    "an empty response": (lambda q, r, s: (q, [*r[:3], T([], dtype=torch.long)], s), r"responses\[3\] is empty"),
    "an empty query": (lambda q, r, s: ([T([], dtype=torch.long), *q[1:]], r, s), r"queries\[0\] is empty"),
    "a 2-D response": (lambda q, r, s: (q, [r[0][None], *r[1:]], s), r"responses\[0\] must be a 1-D.*\(1, 3\)"),
    "floating-point ids": (lambda q, r, s: ([q[0].float(), *q[1:]], r, s), r"queries\[0\] must hold token ids"),
    "an id beyond the vocabulary": (lambda q, r, s: (q, [T([61]), *r[1:]], s), r"responses\[0\] contains token id 61"),
    "a negative id": (lambda q, r, s: (q, [T([-100]), *r[1:]], s), r"responses\[0\] contains token id -100"),
    "longer than the context": (
        lambda q, r, s: ([T([5] * 62), *q[1:]], r, s),
        "query \\+ response of sample 0 is 65 tokens long; the model's context length is 64",
    ),
    "a score per token": (lambda q, r, s: (q, r, [torch.zeros(2), *s[1:]]), r"scores\[0\] must be one number"),
    "2-D scores": (lambda q, r, s: (q, r, [torch.zeros(1, 1), *s[1:]]), r"scores\[0\] must be one number.*\(1, 1\)"),
    "a NaN score": (lambda q, r, s: (q, r, [*s[:2], T(math.nan), s[3]]), r"scores\[2\] is nan"),
    "an infinite score": (lambda q, r, s: (q, r, [T(math.inf), *s[1:]]), r"scores\[0\] is inf"),
    "a float for a score": (lambda q, r, s: (q, r, [1.0, *s[1:]]), r"scores\[0\] must be a tensor, not float"),
    "masks of another length": (
        lambda q, r, s: (q, r, s, [torch.ones(len(x) + 1) for x in r]),
        r"response_masks\[0\] has shape \(4,\); its response has \(3,\)",
    ),
    "a mask of zeros": (
        lambda q, r, s: (q, r, s, [torch.zeros(len(x)) for x in r]),
        r"response_masks exclude every sample",
    ),
    "a NaN token reward": (
        lambda q, r, s: (q, r, s, None, [torch.full((len(x),), math.nan) for x in r]),
        r"token_rewards\[0\] contains a number that is not finite",
    ),
    "a token reward above float32": (
        lambda q, r, s: (q, r, s, None, [torch.full((len(x),), 1e39, dtype=torch.double) for x in r]),
        r"token_rewards\[0\] contains a number that is not finite in float32",
    ),
    "a score above float32": (
        lambda q, r, s: (q, r, [*s[:3], torch.tensor(1e39, dtype=torch.double)]),
        r"scores\[3\] is 1e\+39: scores must be numbers that are finite in float32",
    ),
    "too few token rewards": (lambda q, r, s: (q, r, s, None, []), "token_rewards has 0 elements"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_step_refuses_and_changes_nothing(case: str, make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(use_score_scaling=True)
    before, state = weights_of(trainer), trainer.state_dict()
    arguments, message = BAD_STEPS[case]
    with pytest.raises(ValueError, match=message):
        trainer.step(*arguments(*make_batch()))
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert not trainer.optimizer.state_dict()["state"]
    after = trainer.state_dict()
    assert torch.equal(state.pop("minibatch_order"), after.pop("minibatch_order"))
    assert state == after


def test_seq2seq_needs_the_start_token_and_one_more(make_trainer: Any, make_batch: Any) -> None:
    queries, responses, scores = make_batch(seq2seq=True)
    responses[1] = torch.tensor([0])
    with pytest.raises(ValueError, match=r"responses\[1\] has 1 token; expected at least 2 \(the decoder's start"):
        make_trainer(seq2seq=True).step(queries, responses, scores)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "remainder": ({"batch_size": 10, "mini_batch_size": 4}, "batch_size=10 is not a multiple of mini_batch_size=4"),
    "remainder of accumulation": (
        {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 3},
        "batch_size=8 is not a multiple of mini_batch_size=2 x gradient_accumulation_steps=3 = 6",
    ),
    "no batch": ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
    "half a batch": ({"batch_size": 1.5}, "batch_size=1.5 must be a whole number"),
    "gamma": ({"gamma": 1.5}, "gamma=1.5 must be a number from 0 to 1"),
    "NaN": ({"lam": math.nan}, "lam=nan must be a number"),
    "text": ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0 must be a number above 0"),
    "target": ({"target": 0}, "target=0 must be a number above 0"),
    "kl_penalty": ({"kl_penalty": "k9"}, "kl_penalty='k9' must be one of kl, abs, mse, k3, full"),
    "loss_denominator": ({"loss_denominator": "x"}, "loss_denominator='x' must be one of minibatch, batch"),
    "dual_clip": ({"dual_clip": 1.0}, "dual_clip=1.0 must be a number above 1 or None"),
    "score norm": ({"use_score_norm": True}, "use_score_norm=True needs use_score_scaling=True"),
    "hub": ({"push_to_hub_if_best_kwargs": {"private": True}}, "must contain repo_id"),
    "accumulation": (
        {"accelerator_kwargs": {"gradient_accumulation_steps": 2}},
        "set PPOConfig.gradient_accumulation_steps",
    ),
    "missing_eos_penalty": (
        {"missing_eos_penalty": math.inf},
        "missing_eos_penalty=inf must be a finite number or None",
    ),
    "early stopping": ({"early_stopping": True, "target_kl": 0.0}, "target_kl=0.0 must be a number above 0"),
    "grad norm": ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be a number above 0 or None"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_refuses(case: str) -> None:
    settings, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        PPOConfig(**{"batch_size": 4, **settings})


def test_numbers_of_numpy_are_numbers() -> None:
    config = PPOConfig(batch_size=np.int64(4), learning_rate=np.float32(0.5), keep_memory=np.bool_(False))
    assert repr((config.batch_size, config.learning_rate, config.keep_memory)) == "(4, 0.5, False)"
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        PPOConfig(batch_size=np.int64(0))


def test_config_changed_for_the_worse_is_refused_at_the_next_step(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer()
    trainer.config.mini_batch_size = 3
    with pytest.raises(ValueError, match="batch_size=4 is not a multiple of mini_batch_size=3"):
        trainer.step(*make_batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"batch_size": 1}}, "config must be a PPOConfig, not dict"),
        (
            {"model": "gpt2"},
            "model must have a value head, not be a str: load it with AutoModelForCausalLMWithValueHead",
        ),
        ({"tokenizer": "gpt2"}, "tokenizer must be a transformers tokenizer, not str"),
        (
            {"ref_model": "gpt2"},
            "ref_model must have a value head, not be a str: create it with create_reference_model",
        ),
        ({"dataset": [1, 2, 3]}, "dataset must be a torch Dataset or a datasets.Dataset, not list"),
    ],
)
def test_constructor_refuses(arguments: dict[str, Any], message: str) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    good = {"config": PPOConfig(batch_size=1), "model": model, "tokenizer": tiny_tokenizer()}
    with pytest.raises(ValueError, match=message):
        PPOTrainer(**{**good, **arguments})


def make_trainer_with(optimizer: Any, scheduler: Any = None, model: Any = None) -> PPOTrainer:
    model = model or AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    return PPOTrainer(
        PPOConfig(batch_size=1), model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler
    )


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.Adam(tiny_gpt2().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the given Adam holds none of the model's 30 trainable parameters"):
        make_trainer_with(optimizer)


def test_a_scheduler_that_needs_a_metric_is_refused_before_anything_moves() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"lr_scheduler is a ReduceLROnPlateau, whose step needs metrics: .*mean_scores"
    ):
        make_trainer_with(optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), model)


def test_a_scheduler_of_another_optimizer_gives_a_warning() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for _ in range(2)]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizers[0])
    for given in (optimizers[1], None):
        with pytest.warns(UserWarning, match="the given ConstantLR does not drive the trainer's optimizer"):
            make_trainer_with(given, scheduler, model)


def test_generate_refuses(make_trainer: Any) -> None:
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"query_tensor\[1\] is empty"):
        trainer.generate([torch.tensor([3]), torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match=r"query_tensor\[0\] must be a 1-D"):
        trainer.generate(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="the query of sample 0 is 65 tokens long"):
        trainer.generate(torch.full((65,), 5))


def test_an_exploded_gradient_leaves_the_weights(make_trainer: Any, make_batch: Any) -> None:
    trainer = make_trainer(ppo_epochs=1)
    before = weights_of(trainer)
    next(iter(trainer.model.parameters())).register_hook(lambda grad: grad * math.inf)
    with pytest.warns(UserWarning, match="gradient norm is .*: this optimizer step is skipped"):
        stats = trainer.step(*make_batch())
    assert stats["ppo/skipped_updates"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
