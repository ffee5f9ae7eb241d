"""Checks of settings and models, before anything is sampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl.data import Prompt
from trl.doctor.codes import finding
from trl.models.limits import vocabulary_sizes
from trl.models.padding import ignores_padding
from trl.models.reference import check_reference
from trl.rollout import stop_tokens, unseen_by_scoring
from trl.trackers.findings import Finding
from trl.training.optimizers import inner
from trl.training.run_state import Learner

# A rate of Adam is judged against the one that pretraining a model of this size from scratch takes, which RL
# fine-tuning stays 10 to 100 times below. Adapters take about 10 times more (Schulman et al., LoRA Without Regret,
# 2025).
_ADAPTER_FACTOR = 10.0
_HEADROOM = 3.0  # over that rate; the demo uses a quarter of the rate
_LEAST_PARAMETERS = 10**6  # smaller models take any rate: one of 8,609 parameters learnt at 0.05, 2.5 times its weights
_RUINOUS = 5.0  # rate over the size of the weights


def check_settings(trainer: Learner, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> list[Finding]:
    """Looks at models, optimizer, prompts and sampling settings. One process may call this.

    Args:
        trainer: a PPOTrainer or an OnlineTrainer.
        prompts: the run's prompts.
        generation: arguments of `generate`.
    """
    checks = [_sampling(trainer, generation), _learning_rate(trainer)]
    if not is_sharded(trainer):
        checks += [_models(trainer), _stops(trainer, prompts, generation)]
    return [found for check in checks for found in check]


def is_sharded(trainer: Learner) -> bool:
    """Whether one process alone cannot run the model."""
    kind = trainer.accelerator.distributed_type
    return str(getattr(kind, "value", kind)) in ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def _models(trainer: Learner) -> Iterator[Finding]:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    try:
        ignores_padding(policy)
    except ValueError as error:
        yield finding("not-causal", str(error).partition(": load it")[0].partition(". See")[0])
    if trainer.ref_model is not None:
        try:
            check_reference(trainer.ref_model, trainer.model)
        except ValueError as error:
            yield finding("reference-is-policy", str(error).partition(", and would")[0])


def _sampling(trainer: Learner, generation: Mapping[str, Any]) -> Iterator[Finding]:
    """Sampling settings that the update's log-probabilities ignore: the ratio is biased from the first token on."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    scored = float(trainer.config.temperature)
    unseen = unseen_by_scoring(policy.generation_config, generation, scored)
    if "temperature" in unseen:
        sampled = unseen.pop("temperature")
        yield finding("temperature-mismatch", f"Sampled at temperature={sampled:g}; PPOConfig.temperature={scored:g}")
    if unseen:
        yield finding("sampling-reshaped", ", ".join(f"{name}={_short(value)}" for name, value in unseen.items()))


def _short(value: Any) -> str:
    """A setting on a few characters: processors and lists of tokens have long representations."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_short(item) for item in value[:3])}{', ...' if len(value) > 3 else ''}]"
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__


def _learning_rate(trainer: Learner) -> Iterator[Finding]:
    """The rate of the policy's weights, if the optimizer is of Adam's family: others have another scale."""
    optimizer = inner(trainer.optimizer)
    if "adam" not in type(optimizer).__name__.lower():
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    heads = {id(p) for p in policy.v_head.parameters()}
    rate, weights = 0.0, list[Tensor]()
    for group in optimizer.param_groups:
        trained = [p for p in group["params"] if p.requires_grad and id(p) not in heads]
        if trained and group["lr"] is not None:
            rate = max(rate, float(group["lr"]), float(group.get("initial_lr", 0)))  # warm-up begins at 0
            weights += [p for p in trained if p.dim() > 1]  # not norms and biases, which are 1 and 0
    if not weights:
        return
    # Adam's first steps move every weight by about the rate (Kingma and Ba 2015, section 2.1). At some times the size
    # of the weights themselves, a single step replaces the model.
    typical = _root_mean_square(weights)
    size = sum(p.numel() for p in policy.parameters())
    bound = _HEADROOM * pretraining_rate(size) * (_ADAPTER_FACTOR if policy.is_peft_model else 1.0)
    numbers = f"learning_rate={rate:g} for {size:,} parameters"
    if rate >= _RUINOUS * typical > 0:
        yield finding(
            "learning-rate",
            f"{numbers}, whose weights are about {typical:.2g}: a single step of Adam moves each by "
            f"{rate / typical:.0f} times as much",
            severity="error",
        )
    elif rate > bound and size >= _LEAST_PARAMETERS:
        yield finding("learning-rate", f"{numbers}; pretraining one from scratch takes {pretraining_rate(size):.1g}")


def pretraining_rate(parameters: int) -> float:
    """Learning rate of Adam for pretraining a language model: 0.003239 - 0.0001395 · ln(N).

    Kaplan et al. 2020 (arXiv:2001.08361), equation D.1, which holds up to some billions of parameters.
    """
    return max(0.003239 - 0.0001395 * math.log(max(parameters, 1)), 1e-4)


@torch.no_grad()
def _root_mean_square(weights: Sequence[Tensor]) -> float:
    # Norms, rather than squares, so that no copy of the weights is made. An adapter's zero matrices count as well.
    total = math.fsum(float(torch.linalg.vector_norm(p.detach(), dtype=torch.float32)) ** 2 for p in weights)
    return math.sqrt(total / sum(p.numel() for p in weights))


def _stops(trainer: Learner, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> Iterator[Finding]:
    policy = trainer.accelerator.unwrap_model(trainer.model)
    stops = stop_tokens(policy.generation_config, generation)
    _, vocabulary = vocabulary_sizes(policy)
    if stops and vocabulary is not None and min(stops) >= vocabulary:
        yield finding("stop-token-unreachable", f"Stop tokens {list(stops)}; the model has {vocabulary} tokens")
    if trainer.is_encoder_decoder:
        return  # an encoder's input ends with eos
    # A single eos is how GPT-2 begins a text.
    ended = [prompt for prompt in prompts if len(prompt.tokens) > 1 and int(prompt.tokens[-1]) in stops]
    if 2 * len(ended) > len(prompts):
        token = int(ended[0].tokens[-1])
        yield finding("prompt-ends-with-stop", f"{len(ended)} of {len(prompts)} prompts end with token {token}")
