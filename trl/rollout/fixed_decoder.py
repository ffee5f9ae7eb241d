"""Decodes on a GPU in steps of fixed shapes, so that a CUDA graph can replay them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl.kernels.decode_graph import ReplayedStep, fixed_cache, fixed_decoding
from trl.rollout.decoders import CausalDecoder, Decoder, Seq2SeqDecoder

_COLUMNS = 64  # the cache's capacity is a multiple of this


class FixedDecoder(CausalDecoder):
    """`CausalDecoder` whose steps after the prefill are `ReplayedStep`s over a cache of fixed capacity."""

    # Each time rows are dropped, the step is captured again, which takes as long as some twenty steps; and a step's
    # time hardly depends on a few dozen rows.
    least_dropped_rows = 128

    def __init__(self, model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> None:
        super().__init__(model, queries, limits)
        self.config = model.config.get_text_config(decoder=True)
        self.capacity = -(-self.attention.shape[1] // _COLUMNS) * _COLUMNS
        self._column = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._step = ReplayedStep(self.device)

    def begin(self) -> Tensor:
        logits = super().begin()
        self.cache = fixed_cache(self.cache, self.config, self.capacity, self._column)
        self._column.fill_(self.width)
        allowed = self.attention[:, : self.width].bool()  # [B, Q]
        self._mask = torch.full(
            (len(allowed), 1, 1, self.capacity),
            -torch.inf,
            dtype=self.model.get_input_embeddings().weight.dtype,
            device=self.device,
        )
        self._mask[:, 0, 0, : self.width].masked_fill_(allowed, 0)
        self._tokens = torch.zeros(len(allowed), 1, dtype=torch.int64, device=self.device)
        return logits

    def advance(self, tokens: Tensor) -> Tensor:
        self.copies = None
        self._tokens.copy_(tokens[:, None])
        return self._step(self._decode)

    def _decode(self) -> Tensor:
        """Decodes `_tokens` and moves positions, mask and column on, all of them in place."""
        torch.minimum(self.positions + 1, self.ends, out=self.positions)
        self._mask.index_fill_(3, self._column, 0)
        inputs = {
            "input_ids": self._tokens,
            "position_ids": self.positions,
            "attention_mask": self._mask,
            self.cache_keyword: self.cache,
            "use_cache": True,
        }
        with fixed_decoding(self.config):
            logits = self.model(**inputs).logits[:, -1]
        self._column.add_(1)
        return logits

    def keep(self, rows: Tensor) -> None:
        """Keeps only the batch rows with indices `rows` `[b]`; the next steps are captured again."""
        super().keep(rows)
        self._mask, self._tokens = self._mask[rows], self._tokens[rows]
        self._step = ReplayedStep(self.device)


def decoder_for(model: Any, queries: Sequence[Tensor], limits: Sequence[int], *, fixed_steps: bool = False) -> Decoder:
    """Builds the decoder for the model's architecture; with `fixed_steps`, a `FixedDecoder` if it is decoder-only."""
    if model.config.is_encoder_decoder:
        return Seq2SeqDecoder(model, queries, limits)
    return (FixedDecoder if fixed_steps else CausalDecoder)(model, queries, limits)
