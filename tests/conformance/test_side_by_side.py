"""Whole steps of the trainer beside an independent PPO in float64: every statistic and every weight, setting by setting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.float64_ppo import Float64PPO
from tests.conformance.setting import language_model, with_value_head
from tests.helpers import assert_close, tiny_tokenizer
from tests.models.lora import lora
from trl.models import create_reference_model
from trl.trainer import PPOConfig, PPOTrainer

pytestmark = pytest.mark.conformance

STOPS = (1, 5, 7)
# Each asks for as much at once as fits together.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "holes": {
        "masks": True, "token_rewards": True, "kl_penalty": "k3", "temperature": 0.7, "gamma": 0.9, "lam": 0.5,
        "whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True, "score_clip": 0.8,
        "missing_eos_penalty": 1.5, "stop_token_ids": list(STOPS),
    },
    "sampler": {
        "masks": True, "sampler": True, "importance_cap": 1.3, "loss_denominator": "batch", "kl_penalty": "full",
        "temperature": 1.7, "mini_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0.3,
    },
    "adapter": {"adapter": True, "masks": True, "kl_penalty": "abs", "gradient_checkpointing": True},
}  # fmt: skip
SLOW: dict[str, dict[str, Any]] = {
    "t5": {"architecture": "t5", "masks": True, "token_rewards": True, "sampler": True, "kl_penalty": "mse"},
    "t5 exact": {"architecture": "t5", "kl_penalty": "full", "temperature": 0.8, "gradient_checkpointing": True},
    "llama": {"architecture": "llama", "masks": True, "kl_penalty": "full", "temperature": 0.6},
    "llama adapter": {"architecture": "llama", "adapter": True, "kl_penalty": "full", "token_rewards": True},
    "clips": {"dual_clip": 1.05, "cliprange": 0.05, "cliprange_value": 0.02, "ppo_epochs": 4},
    "early": {"early_stopping": True, "target_kl": 0.0005, "ppo_epochs": 4},
    "warmup": {"value_warmup_steps": 1, "lam": 0.0},
    "returns": {"lam": 1.0, "gamma": 0.5, "adap_kl_ctrl": False, "init_kl_coef": 0.5},
    "singles": {"mini_batch_size": 1, "horizon": 20, "target": 0.1},
    "frozen below": {"frozen": ("wte", "wpe", "h.0."), "masks": True},
    "momentum": {"optimizer": "momentum", "masks": True},
    "groups": {"optimizer": "groups"},
    "amsgrad": {"optimizer": "amsgrad"},
}
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-3, eps=1e-5),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=1e-3, eps=1e-5, amsgrad=True),
    "groups": lambda ps: torch.optim.AdamW(
        [{"params": ps[:5], "lr": 1e-3}, {"params": ps[5:], "lr": 3e-4, "weight_decay": 0.2}], eps=1e-5
    ),
}


def batch(seed: int, start: int | None, masks: bool, token_rewards: bool, sampler: bool) -> dict[str, Any]:
    """Six ragged samples with eos and padding in the middle of responses, and holes of every kind."""
    random = torch.Generator().manual_seed(seed)

    def words(length: int) -> Tensor:
        return torch.randint(3, 61, (length,), generator=random)

    queries, responses = ([words(n) for n in lengths] for lengths in ((3, 7, 1, 5, 4, 2), (5, 2, 7, 1, 6, 4)))
    responses[0][-1], responses[2][-1], responses[4][2], responses[4][3] = 5, 1, 0, 1
    off = [[0], [0, 1], [2, 6], [], [0, 1, 2, 3, 4, 5], [1, 2]]  # tokens that are not the policy's own
    if start is not None:
        responses = [torch.cat([torch.tensor([start]), r]) for r in responses]
        off = [[t + 1 for t in tokens] for tokens in off]
    found: dict[str, Any] = {"queries": queries, "responses": responses}
    found["scores"] = list(torch.randn(6, generator=random) * 2 + 1)
    if masks:
        found["response_masks"] = [
            torch.tensor([float(t not in o) for t in range(len(r))]) for r, o in zip(responses, off)
        ]
        if start is not None:
            for row in (1, 4):  # left out as a whole
                found["response_masks"][row][0] = 0
    if token_rewards:
        found["token_rewards"] = [torch.randn(len(r), generator=random) for r in responses]
    if sampler:
        found["sampler_logprobs"] = [-6 * torch.rand(len(r), generator=random) for r in responses]
    return found


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], ids=[*CASES, *SLOW]
)
def test_every_statistic_and_every_weight(name: str) -> None:
    settings = dict((CASES | SLOW)[name])
    architecture = settings.pop("architecture", "gpt2")
    optimizer = OPTIMIZERS[settings.pop("optimizer", "adam")]
    kinds = {kind: settings.pop(kind, False) for kind in ("masks", "token_rewards", "sampler")}
    base = language_model(architecture, spread=1.0 if architecture == "t5" else 3.0)
    frozen, reference = settings.pop("frozen", ()), None
    if settings.pop("adapter", False):
        modules = {"gpt2": ["c_attn"], "llama": ["q_proj", "down_proj"]}[architecture]
        model = with_value_head(lora(base, target_modules=modules, fan_in_fan_out=architecture == "gpt2"))
    else:
        model = with_value_head(base)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in parameter_name for part in frozen))
        reference = create_reference_model(model)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(0.9)
    trainer = PPOTrainer(
        PPOConfig(**({"batch_size": 6, "mini_batch_size": 2, "ppo_epochs": 2} | settings)),
        model,
        reference,
        tiny_tokenizer("left" if name == "holes" else "right"),
        optimizer=optimizer([p for p in model.parameters() if p.requires_grad]),
    )
    oracle = Float64PPO(model, reference, trainer.config, optimizer, STOPS if "stop_token_ids" in settings else (1,))
    for seed in range(2):
        arguments = batch(seed, 0 if architecture == "t5" else None, **kinds)
        expected = oracle.step(**arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "objective/kl is")  # responses are random words, sampled from neither
            found = trainer.step(**arguments)
        for key, number in expected.items():
            assert abs(found[key] - number) <= 2e-5 * (1 + abs(number)), (
                f"{key} of step {seed}: {found[key]}, not {number}"
            )
    weights = dict(trainer.model.named_parameters())
    for parameter_name, parameter in oracle.model.named_parameters():
        assert_close(weights[parameter_name], parameter, 2e-5)
