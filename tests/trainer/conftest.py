"""A small trainer, and batches for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer

Batch = tuple[list[Tensor], list[Tensor], list[Tensor]]


@pytest.fixture
def make_trainer() -> Callable[..., PPOTrainer]:
    """`make_trainer(seq2seq=False, trainer_class=PPOTrainer, model=None, ..., **config)`."""

    def make(
        seq2seq: bool = False,
        trainer_class: type[PPOTrainer] = PPOTrainer,
        model: Any = None,
        tokenizer: Any = None,
        optimizer: Any = None,
        **config: Any,
    ) -> PPOTrainer:
        settings = {"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-3, **config}
        if model is None and seq2seq:
            model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5(), summary_dropout_prob=0.0)
        elif model is None:
            model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
        return trainer_class(PPOConfig(**settings), model, None, tokenizer or tiny_tokenizer(), optimizer=optimizer)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(n=4, seq2seq=False)`: ragged queries and responses, and scores."""

    def make(n: int = 4, seq2seq: bool = False, seed: int = 0) -> Batch:
        random = torch.Generator().manual_seed(seed)

        def words(length: int) -> Tensor:
            return torch.randint(3, 61, (length,), generator=random)

        queries = [words(2 + i % 3) for i in range(n)]
        responses = [words(3 + (2 * i) % 5) for i in range(n)]
        if seq2seq:
            responses = [torch.cat([torch.tensor([0]), r]) for r in responses]
        return queries, responses, list(torch.randn(n, generator=random))

    return make


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """A copy of every weight of the policy."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
