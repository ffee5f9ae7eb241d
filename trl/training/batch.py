"""The input batch of one `step` call: queries and responses, raw and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl.data import place_on_columns, response_columns
from trl.rollout import same_queries
from trl.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`B` queries and responses as given, and `inputs`, the same padded for the model."""

    queries: list[Tensor]  # 1-D token ids
    responses: list[Tensor]  # 1-D; an encoder-decoder's begin with the decoder's start token
    inputs: Mapping[str, Tensor]
    is_encoder_decoder: bool
    response_masks: Sequence[Tensor] | None = None  # one number per response token, 0 where it does not count

    def rows(self, rows: Tensor) -> Batch:
        """Selects the samples at indices `rows` `[b]`, keeping their padding."""
        indices = rows.tolist()
        return replace(
            self,
            queries=[self.queries[i] for i in indices],
            responses=[self.responses[i] for i in indices],
            inputs={name: tensor[rows.to(tensor.device)] for name, tensor in self.inputs.items()},
            response_masks=None if self.response_masks is None else [self.response_masks[i] for i in indices],
        )

    @property
    def attention(self) -> Tensor:
        """`[B, T]` attention mask of the sequences with the responses (the decoder's, if separate): 0 on padding."""
        return self.inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]

    def place(self, values: Sequence[Tensor]) -> Tensor:
        """Places one number per response token in a `[B, S]` float32 tensor of zeros.

        The number of an encoder-decoder's start token is dropped, since that token is given, not predicted.
        """
        prefix_lengths = [1] * len(values) if self.is_encoder_decoder else [len(query) for query in self.queries]
        sampled = [v[1:] for v in values] if self.is_encoder_decoder else values
        columns = response_columns(self.attention, prefix_lengths, [len(v) for v in sampled])
        return place_on_columns(sampled, columns, self.attention[:, 1:].float())

    def rollout(
        self,
        *,
        policy_version: int = 0,
        group: Tensor | None = None,
        sampler_logprobs: Sequence[Tensor] | None = None,
    ) -> Rollout:
        """Converts the batch to a `Rollout`; its mask comes from the lengths and from `response_masks`.

        Args:
            policy_version: version of the weights that sampled the responses.
            group: `[B]` int64, equal for responses to one prompt; by default, equal for equal queries.
            sampler_logprobs: log-probability of each response token under the distribution that sampled it.

        Raises:
            ValueError: if the padded inputs hold more or fewer tokens than queries and responses.
        """
        attention = self.attention.bool()
        lengths = [len(response) for response in self.responses]
        if not self.is_encoder_decoder:
            lengths = [len(query) + n for query, n in zip(self.queries, lengths, strict=True)]
        for i, (attended, length) in enumerate(zip(attention.sum(dim=1).tolist(), lengths, strict=True)):
            if attended != length:
                raise ValueError(
                    f"row {i} of the model inputs has {attended} tokens, but its query and response give {length}: "
                    "prepare_model_inputs may pad, but not add or remove tokens"
                )
        masks = self.response_masks
        counts = [torch.ones(len(response)) for response in self.responses] if masks is None else masks
        tokens = self.inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        return Rollout(
            tokens=tokens,
            attention=attention,
            mask=self.place([count != 0 for count in counts]).bool(),
            group=(same_queries(self.queries) if group is None else group).to(tokens.device),
            encoder_tokens=self.inputs["input_ids"] if self.is_encoder_decoder else None,
            encoder_attention=self.inputs["attention_mask"].bool() if self.is_encoder_decoder else None,
            sampler_logprobs=None if sampler_logprobs is None else self.place(sampler_logprobs),
            policy_version=policy_version,
        )
