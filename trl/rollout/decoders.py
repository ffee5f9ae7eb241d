"""Steps a plain transformers language model through its forward pass and a KV cache, one token per row at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from trl.import_utils import cache_keyword
from trl.kernels.kv_cache import growing_cache, numbers_per_token


class Decoder:
    """Steps a model with a KV cache and returns the next-token logits of each row."""

    least_dropped_rows = 1  # finished rows that make `keep` worth its cost

    def __init__(self, model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.cache: Any = None
        self.parameters = _parameters(model)
        self.cache_keyword = cache_keyword(self.parameters)
        self.copies: Tensor | None = None  # maps batch rows to rows of the last forward pass; None if the same

    def begin(self) -> Tensor:
        """Prefills the queries and returns the logits `[B, V]` of the first tokens."""
        raise NotImplementedError

    def advance(self, tokens: Tensor) -> Tensor:
        """Appends one token per row, `[b]`, and returns the logits `[b, V]` of the next."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Keeps only the batch rows with indices `rows` `[b]`."""
        self.cache.batch_select_indices(rows)

    def cached_per_token(self) -> int:
        """Returns how many numbers the cache holds per token of a row; needs a filled cache, so call `begin` first."""
        return numbers_per_token(self.cache)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of the model's `forward`, under any PEFT wrapper."""
    plain = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return _signature(type(plain).forward).parameters


def _last_column(parameters: Mapping[str, inspect.Parameter], width: int, device: torch.device) -> dict[str, Any]:
    """Returns the argument that restricts logits to the last of `width` columns, if the model supports it."""
    parameter = parameters.get("logits_to_keep")
    if parameter is None or width == 1:
        return {}
    # Prefer an index: a slice is non-contiguous, and torch then multiplies each row with a copy of the weights.
    by_index = "Tensor" in str(parameter.annotation)
    return {"logits_to_keep": torch.tensor([width - 1], device=device) if by_index else 1}


class CausalDecoder(Decoder):
    """Decoder-only models: left-pads queries so that every row's next token is in the same column.

    Repeated queries are prefilled once.
    """

    def __init__(self, model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> None:
        super().__init__(model, queries, limits)
        width = max(len(query) for query in queries)
        # Finished rows may stay in the batch, so positions stop at each row's last one.
        self.ends = torch.tensor([[len(q) + limit - 1] for q, limit in zip(queries, limits, strict=True)])  # [B, 1]
        self.ends = self.ends.to(self.device)
        unique: dict[tuple[int, ...], int] = {}
        self.source = [unique.setdefault(tuple(query.tolist()), len(unique)) for query in queries]
        self.tokens = torch.zeros(len(unique), width, dtype=torch.int64)
        self.attention = torch.zeros(len(unique), width + max(limits), dtype=torch.int64)
        for row, query in enumerate(unique):
            self.tokens[row, width - len(query) :] = torch.tensor(query)
            self.attention[row, width - len(query) :] = 1
        self.tokens, self.attention = self.tokens.to(self.device), self.attention.to(self.device)
        self.width = width
        self.ragged = any(len(query) != width for query in unique)
        self.takes_positions = "position_ids" in self.parameters
        self.positions = (self.attention[:, :width].cumsum(dim=1) - 1).clamp(min=0)  # [B, columns of this pass]
        self.cache = growing_cache(model.config)

    def _forward(self, tokens: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": tokens, self.cache_keyword: self.cache, "use_cache": True}
        if self.ragged or not self.takes_positions:
            inputs["attention_mask"] = self.attention[:, : self.width]
        if self.takes_positions:
            inputs["position_ids"] = self.positions
        inputs |= _last_column(self.parameters, tokens.shape[1], self.device)
        return self.model(**inputs).logits[:, -1]

    def begin(self) -> Tensor:
        logits = self._forward(self.tokens)
        self.positions = self.positions[:, -1:]
        if len(self.source) != len(self.tokens):
            self.copies = torch.tensor(self.source, device=self.device)
            self._select(self.copies)
            logits = logits[self.copies]
        return logits

    def advance(self, tokens: Tensor) -> Tensor:
        self.copies = None
        self.width += 1
        self.positions = torch.minimum(self.positions + 1, self.ends)
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        self._select(rows)
        self.ends = self.ends[rows]

    def _select(self, rows: Tensor) -> None:
        super().keep(rows)
        self.attention, self.positions = self.attention[rows], self.positions[rows]


class Seq2SeqDecoder(Decoder):
    """Encoder-decoder models: encodes the queries once; the decoder begins with its start token."""

    def __init__(self, model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> None:
        super().__init__(model, queries, limits)
        width = max(len(query) for query in queries)
        tokens = torch.zeros(len(queries), width, dtype=torch.int64)
        self.attention = torch.zeros(len(queries), width, dtype=torch.int64)
        for row, query in enumerate(queries):
            tokens[row, : len(query)] = query
            self.attention[row, : len(query)] = 1
        self.tokens, self.attention = tokens.to(self.device), self.attention.to(self.device)
        self.start = start_token(model)
        config = model.config.get_text_config(decoder=True)
        self.cache = EncoderDecoderCache(growing_cache(config), growing_cache(config))
        self.encoded: Any = None

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.attention,
            decoder_input_ids=tokens,
            use_cache=True,
            **{self.cache_keyword: self.cache},
        ).logits[:, -1]

    def begin(self) -> Tensor:
        self.encoded = self.model.get_encoder()(input_ids=self.tokens, attention_mask=self.attention)
        return self._forward(torch.full((len(self.tokens), 1), self.start, device=self.device))

    def advance(self, tokens: Tensor) -> Tensor:
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.attention = self.attention[rows]
        self.encoded = type(self.encoded)(last_hidden_state=self.encoded.last_hidden_state[rows])

    def cached_per_token(self) -> int:
        """Returns how many numbers the cache holds per token of a query or of a response, whichever takes more."""
        return max(map(numbers_per_token, (self.cache.self_attention_cache, self.cache.cross_attention_cache)))


def start_token(model: Any) -> int:
    """Returns the token id that an encoder-decoder's responses begin with.

    Raises:
        ValueError: if neither the generation config nor the model config defines one.
    """
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    raise ValueError(f"{type(model).__name__} has no decoder_start_token_id")
