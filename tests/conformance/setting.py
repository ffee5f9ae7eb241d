"""A small PPO run for the tests of this folder, and what plain transformers says about its tokens.

The oracle looks at one sequence at a time, without padding, through the language model alone: no trainer, no wrapper,
no mask.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from trl.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    create_reference_model,
)
from trl.trainer import PPOConfig, PPOTrainer

QUERY_LENGTHS = (3, 7, 1, 5, 4, 2, 6, 3)
RESPONSE_LENGTHS = (5, 2, 8, 1, 6, 3, 4, 7)


def language_model(architecture: str = "gpt2", seed: int = 0, spread: float | None = None, **overrides: Any) -> Any:
    """A tiny model whose matrices are blown up until its distributions are far from uniform, so that mistakes show."""
    spread = (1.0 if architecture == "t5" else 20.0) if spread is None else spread
    model = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}[architecture](seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


def with_value_head(model: Any, **settings: Any) -> Any:
    """The model with a value head that says something."""
    wrapper = (
        AutoModelForSeq2SeqLMWithValueHead if model.config.is_encoder_decoder else AutoModelForCausalLMWithValueHead
    )
    torch.manual_seed(7)
    return wrapper.from_pretrained(model, v_head_init_strategy="normal", summary_dropout_prob=0.0, **settings)


def make_trainer(
    model: Any = None,
    reference: Any = None,
    tokenizer: Any = None,
    learning_rate: float | None = None,
    sgd: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
    **settings: Any,
) -> PPOTrainer:
    """Eight samples, one optimizer step and one epoch unless told otherwise; SGD where weights are to be compared."""
    model = with_value_head(language_model()) if model is None else model
    reference = create_reference_model(model) if reference is None else reference
    rate = 1e-3 if learning_rate is None else learning_rate
    settings = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1, "learning_rate": rate} | settings
    if sgd:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*dataset.*", category=UserWarning)
        return PPOTrainer(
            PPOConfig(**settings),
            model,
            reference,
            tiny_tokenizer() if tokenizer is None else tokenizer,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )


def make_batch(
    size: int = 8, seed: int = 0, start_token: int | None = None, low: int = 3
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ragged queries, responses (after `start_token` for an encoder-decoder) and scores."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> Tensor:
        return torch.randint(low, 61, (length,), generator=generator)

    queries = [words(QUERY_LENGTHS[i % 8]) for i in range(size)]
    responses = [words(RESPONSE_LENGTHS[i % 8]) for i in range(size)]
    if start_token is not None:
        responses = [torch.cat([torch.tensor([start_token]), response]) for response in responses]
    return queries, responses, list(torch.randn(size, generator=generator))


def plain_logits(model: Any, query: Tensor, response: Tensor) -> Tensor:
    """`[R, V]` float64 logits with which each response token was or would be chosen, from plain transformers."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=query[None], decoder_input_ids=response[None]).logits[0, :-1]
        else:
            logits = model(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
    return logits.double()


def plain_logprobs(model: Any, query: Tensor, response: Tensor, temperature: float = 1.0) -> Tensor:
    """`[R]` float64 log-probabilities of the response's sampled tokens, from plain transformers."""
    logits = plain_logits(model, query, response) / temperature
    sampled = response[-len(logits) :]
    return torch.log_softmax(logits, dim=-1).gather(1, sampled[:, None])[:, 0]


def plain_entropies(model: Any, query: Tensor, response: Tensor, temperature: float = 1.0) -> Tensor:
    """`[R]` float64 entropies of the distributions that the response's tokens were chosen from."""
    logp = torch.log_softmax(plain_logits(model, query, response) / temperature, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def on_responses(array: Any, queries: Sequence[Tensor], responses: Sequence[Tensor], side: str = "right") -> Tensor:
    """The entries of a decoder's `[B, S]` array that concern response tokens, one after the other."""
    array = torch.as_tensor(array)
    width, parts = array.shape[1], []
    for row, query, response in zip(array, queries, responses):
        skipped = 0 if side == "right" else width + 1 - len(query) - len(response)
        first = skipped + len(query) - 1
        parts.append(row[first : first + len(response)])
    return torch.cat(parts)


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def gradients_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """A copy of the gradients that `step` left in place."""
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def scalars(stats: dict[str, Any]) -> dict[str, float]:
    """The statistics that are single numbers, without clocks."""
    machine = ("time/", "memory/", "ppo/time/")
    return {k: float(v) for k, v in stats.items() if not k.startswith(machine) and _single(v)}


def _single(value: Any) -> bool:
    return isinstance(value, int | float) or getattr(value, "ndim", 1) == 0
