"""Reward from a reward adapter on the policy's own base model: no second model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl.types import Sample


class HasRewardAdapter(Protocol):
    """A value-head model with a reward adapter."""

    reward_score: nn.Linear | None
    is_encoder_decoder: Any
    device: Any

    def compute_reward_score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns scores `[B, T, labels]` of tokens `[B, T]`."""
        ...


class AdapterReward:
    """Scores query + response with a model's reward adapter, at the last token.

    The adapter reads the policy's own tokens, so it must have been trained with the policy's tokenizer.

    Args:
        model: a value-head model loaded with `reward_adapter=`: the policy itself. Of a trainer's wrapped model, pass
            `trainer.accelerator.unwrap_model(trainer.model)`.
        label: output of the score head to use.
        eos_token_id: if given, this token at the end of a response is not read. Pass it if the reward adapter was
            trained on texts without it at their ends.
        batch_size: sequences per forward pass; > 0.

    Raises:
        ValueError: if the model has no reward adapter or no such label, is an encoder-decoder, or `batch_size` is not
            positive.
    """

    def __init__(
        self, model: HasRewardAdapter, label: int = 0, eos_token_id: int | None = None, batch_size: int = 16
    ) -> None:
        head = getattr(model, "reward_score", None)
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"model ({type(model).__name__}) has no reward adapter: load it with "
                "AutoModelForCausalLMWithValueHead.from_pretrained(..., peft_config=..., reward_adapter=...)"
            )
        if model.is_encoder_decoder:
            raise ValueError(
                "AdapterReward reads query and response as one text, which an encoder-decoder does not: "
                "use ClassifierReward, or a function that calls model.compute_reward_score(..., decoder_input_ids=...)"
            )
        if not 0 <= label < head.out_features:
            raise ValueError(f"label={label} is not an output of the score head, which has {head.out_features}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not positive")
        self.model = model
        self.label = label
        self.eos_token_id = eos_token_id
        self.batch_size = batch_size

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Returns one score per sample.

        Raises:
            ValueError: if a sample has no tokens to read.
        """
        rows = [self._tokens(sample) for sample in samples]
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise ValueError(f"sample {empty[0]} has no tokens to score")
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._score([rows[i] for i in batch]).tolist(), strict=True):
                scores[i] = score
        return scores

    def _tokens(self, sample: Sample) -> list[int]:
        response = list(sample.completion_ids)
        if response and response[-1] == self.eos_token_id:
            response.pop()
        return [*sample.prompt_ids, *response]

    def _score(self, rows: list[list[int]]) -> Tensor:
        """`[B]` scores of rows of tokens; padded on the right, which no earlier token sees."""
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.model.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=tokens.device)
        attention = torch.arange(tokens.shape[1], device=tokens.device) <= last[:, None]
        scores = self.model.compute_reward_score(tokens, attention)[..., self.label]  # [B, T]
        return scores.gather(1, last[:, None]).squeeze(1)
