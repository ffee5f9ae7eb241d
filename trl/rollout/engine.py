"""Native decoding loop: one uniform random number per row and token, recorded logprobs, and batch compaction.

It drives a plain transformers language model through its forward pass and a KV cache, and drops finished rows from
the batch. There is no list of supported models: `obstacle` checks a model against its own uncached forward pass.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from trl.functional.sampling import cut_logits, draw
from trl.import_utils import cache_keyword
from trl.kernels.decode_attention import decoding
from trl.kernels.kv_cache import GrowingLayer, growing_cache
from trl.kernels.packed_weights import LEAST_TOKENS, packed_weights
from trl.kernels.products import shared_size

logger = logging.getLogger(__name__)

# Compact the batch once this fraction of its rows has finished: each compaction copies the KV cache of the others.
_COMPACT_SHARE = 0.25
# Logits processed at once when sampling on a CPU.
_NUMBERS_AT_ONCE = 2**19
# Tolerance of the check in `obstacle`: RMS error over the logits' standard deviation, by bytes per weight. Rounding to
# bfloat16 alone moves the logits by 0.25, relative to float32.
CHECK_TOLERANCE = {8: 1e-3, 4: 1e-3, 2: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling distribution of the next token, and the stop tokens."""

    greedy: bool = False  # take the most likely token; ignores temperature, top_k, top_p and min_p
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stops: tuple[int, ...] = ()  # ids of tokens that end a response
    least_tokens: int = 0  # minimum response length; stop tokens are masked before it

    def logits(self, raw: Tensor, drawn: int) -> Tensor:
        """Returns the float32 logits `[B, V]` of the sampling distribution, after `drawn` tokens of the response."""
        logits = raw.float() / self.temperature if self.temperature != 1.0 and not self.greedy else raw.float()
        if drawn < self.least_tokens and self.stops:
            logits = logits.index_fill(-1, torch.tensor(self.stops, device=logits.device), -torch.inf)
        if self.greedy:
            return logits
        return cut_logits(logits, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Sampled responses with logprobs and values recorded during decoding; one list entry per query."""

    responses: list[Tensor]  # 1-D int64, including the stop token if one was sampled
    logprobs: list[Tensor]  # 1-D float32, under the sampling distribution; 0 if greedy
    values: list[Tensor] | None = None  # 1-D float32, of the state before each token


class _Decoder:
    """Steps a model with a KV cache and returns the next-token logits of each row."""

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


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of the model's `forward`, under any PEFT wrapper."""
    plain = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    return inspect.signature(type(plain).forward).parameters


def _last_column(parameters: Mapping[str, inspect.Parameter], width: int, device: torch.device) -> dict[str, Any]:
    """Returns the argument that restricts logits to the last of `width` columns, if the model supports it."""
    found = parameters.get("logits_to_keep")
    if found is None or width == 1:
        return {}
    # Prefer an index: a slice is non-contiguous, and torch then multiplies each row with a copy of the weights.
    by_index = "Tensor" in str(found.annotation)
    return {"logits_to_keep": torch.tensor([width - 1], device=device) if by_index else 1}


class _CausalDecoder(_Decoder):
    """Decoder-only models: left-pads queries so that every row's next token is in the same column.

    Repeated queries are prefilled once.
    """

    def __init__(self, model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> None:
        super().__init__(model, queries, limits)
        width, room = max(len(query) for query in queries), max(limits)
        self.ends = [len(query) + limit - 1 for query, limit in zip(queries, limits, strict=True)]
        self.last: Tensor | None = None  # [B] positions that no row passes: one that has ended may stay in the batch
        found: dict[tuple[int, ...], int] = {}
        self.source = [found.setdefault(tuple(query.tolist()), len(found)) for query in queries]
        queries = [torch.tensor(query) for query in found]
        self.tokens = torch.zeros(len(queries), width, dtype=torch.int64)
        self.attention = torch.zeros(len(queries), width + room, dtype=torch.int64)
        for row, query in enumerate(queries):
            self.tokens[row, width - len(query) :] = query
            self.attention[row, width - len(query) :] = 1
        self.tokens, self.attention = self.tokens.to(self.device), self.attention.to(self.device)
        self.width = width
        self.ragged = any(len(query) != width for query in queries)
        self.positions = "position_ids" in self.parameters
        self.cache = growing_cache(model.config)

    def _forward(self, tokens: Tensor) -> Tensor:
        attention = self.attention[:, : self.width]
        inputs: dict[str, Any] = {"input_ids": tokens, self.cache_keyword: self.cache, "use_cache": True}
        if self.ragged or not self.positions:
            inputs["attention_mask"] = attention
        if self.positions:
            positions = attention.cumsum(dim=1)[:, -tokens.shape[1] :] - 1
            positions = positions.clamp(min=0)
            inputs["position_ids"] = positions if self.last is None else torch.minimum(positions, self.last[:, None])
        inputs |= _last_column(self.parameters, tokens.shape[1], self.device)
        return self.model(**inputs).logits[:, -1]

    def begin(self) -> Tensor:
        logits = self._forward(self.tokens)
        if len(self.source) != len(self.tokens):
            self.copies = torch.tensor(self.source, device=self.device)
            self.keep(self.copies)
            logits = logits[self.copies]
        self.last = torch.tensor(self.ends, device=self.device)
        return logits

    def advance(self, tokens: Tensor) -> Tensor:
        self.copies = None
        self.width += 1
        return self._forward(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.attention = self.attention[rows]
        if self.last is not None:
            self.last = self.last[rows]


class _Seq2SeqDecoder(_Decoder):
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
    raise ValueError(f"{type(model).__name__} names no decoder_start_token_id")


def _decoder(model: Any, queries: Sequence[Tensor], limits: Sequence[int]) -> _Decoder:
    kind = _Seq2SeqDecoder if model.config.is_encoder_decoder else _CausalDecoder
    return kind(model, queries, limits)


@torch.no_grad()
def sample(
    model: Any,
    queries: Sequence[Tensor],
    *,
    sampling: Sampling,
    limits: Sequence[int],
    uniforms: Tensor,
    values: Callable[[], Tensor] | None = None,
) -> Sampled:
    """Samples one response per query, as one batch.

    Args:
        model: a plain transformers language model, possibly with adapters, in evaluation mode.
        queries: `B` 1-D token tensors.
        sampling: sampling distribution and stop tokens.
        limits: maximum new tokens of each response; >= 1.
        uniforms: `[max(limits), B]` float64 in [0, 1): token `t` of row `b` is drawn with `uniforms[t, b]`, so that a
            response depends neither on the rest of its batch nor on the other responses' lengths.
        values: returns the values `[b, T]` of the latest forward pass; None records no values.

    Returns:
        The sampled responses, without an encoder-decoder's start token.

    Raises:
        RuntimeError: if logits are NaN or infinite.
    """
    with decoding(model), packed_weights(model, rows=len(queries), tokens=max(limits)):
        return _sample(model, queries, sampling, limits, uniforms, values)


def _sample(
    model: Any,
    queries: Sequence[Tensor],
    sampling: Sampling,
    limits: Sequence[int],
    uniforms: Tensor,
    values: Callable[[], Tensor] | None,
) -> Sampled:
    count, longest = len(queries), max(limits)
    decoder = _decoder(model, queries, limits)
    device = decoder.device
    limit = torch.tensor(list(limits), device=device)
    stops = torch.tensor(sampling.stops, device=device)
    uniforms = uniforms.to(device)
    tokens = torch.zeros(count, longest, dtype=torch.int64, device=device)
    logprobs = torch.zeros(count, longest, device=device)
    critic = torch.zeros(count, longest, device=device)
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    rows = torch.arange(count, device=device)  # query index of each row of the compacted batch
    live = torch.ones(count, dtype=torch.bool, device=device)  # unfinished rows of the compacted batch
    raw = decoder.begin()
    for t in range(longest):
        chosen, seen = _choose(sampling, raw, t, uniforms[t, rows])
        tokens[rows, t], logprobs[rows, t] = chosen, seen
        if values is not None:
            value = values()[:, -1].float()
            critic[rows, t] = value if decoder.copies is None else value[decoder.copies]
        lengths[rows] += live.long()
        live = live & (limit[rows] > t + 1)
        if len(stops):
            live = live & ~torch.isin(chosen, stops)
        left = int(live.sum())
        if left == 0:
            break
        room = shared_size(left, steps=4) if device.type == "cpu" else left
        if room <= (1 - _COMPACT_SHARE) * len(rows):
            kept = live.logical_not().argsort(stable=True)[:room].sort().values  # may include finished rows
            decoder.keep(kept)
            rows, chosen, live = rows[kept], chosen[kept], live[kept]
        raw = decoder.advance(chosen)
    sizes = lengths.tolist()
    if bool((broken := logprobs.isnan()).any()):
        row, drawn = broken.nonzero()[0].tolist()
        raise RuntimeError(
            f"{type(model).__name__}: logits after {len(queries[row])} tokens of a query and {drawn} of its response hold NaN or "
            f"infinity, so that nothing can be sampled: are its weights ({next(model.parameters()).dtype}) finite?"
        )

    def cut(table: Tensor) -> list[Tensor]:
        return [row[:size].clone() for row, size in zip(table, sizes, strict=True)]

    return Sampled(responses=cut(tokens), logprobs=cut(logprobs), values=None if values is None else cut(critic))


def _choose(sampling: Sampling, raw: Tensor, drawn: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Samples tokens `[b]` from raw logits `[b, V]` after `drawn` tokens; returns them and their logprobs `[b]`."""
    # On a CPU, in chunks that fit into its cache.
    at_once = max(1, _NUMBERS_AT_ONCE // raw.shape[1]) if raw.device.type == "cpu" else len(raw)
    found: list[tuple[Tensor, Tensor]] = []
    for some, numbers in zip(raw.split(at_once), uniforms.split(at_once), strict=True):
        logits = sampling.logits(some, drawn)
        found.append(_likeliest(logits) if sampling.greedy else draw(logits, numbers))
    tokens, logprobs = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`[b]` tokens, and zeros: NaN where logits `[b, V]` have no largest one that is finite."""
    tokens = logits.argmax(dim=-1)
    largest = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, largest - largest


def obstacle(model: Any) -> str | None:
    """Returns why the engine cannot drive a model, or None if it can.

    Decodes a few tokens after two short prompts of different lengths and compares the logits with plain forward passes
    over each sequence, without cache and padding. The tolerance is `CHECK_TOLERANCE`.
    """
    name = type(model).__name__
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if not callable(supports) or not supports() or getattr(model, "_is_stateful", False):
        return f"{name} keeps its state in another way than in a key-value cache"
    if not model.config.is_encoder_decoder:
        kinds = {type(layer) for layer in growing_cache(model.config).layers}
        if strange := kinds - {GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer}:
            return f"{name} has layers whose state is a {sorted(kind.__name__ for kind in strange)}"
    try:
        gap = _gap(model)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        return f"{name} could not be decoded step by step: {type(error).__name__}: {error}"
    if not gap <= CHECK_TOLERANCE.get(model.get_input_embeddings().weight.element_size(), 0.5):
        return f"{name} decoded step by step is off its own forward pass by {gap:.1e} standard deviations of its logits"
    return None


@torch.no_grad()
def _gap(model: Any) -> float:
    """Returns the largest relative RMS error of a row of logits, decoding against plain forward passes."""
    words = model.get_input_embeddings().weight.shape[0]
    device = next(model.parameters()).device
    # Tokens from the middle of the vocabulary: special tokens are at its ends.
    word = [words // 2 + i % max(1, words // 4) for i in range(12)]
    queries = [torch.tensor(word[:3], device=device), torch.tensor(word[3:8], device=device)]
    given = [
        torch.tensor([a, b], device=device) for a, b in ((word[8], word[9]), (word[10], word[11]), (word[0], word[5]))
    ]
    with decoding(model), packed_weights(model, rows=len(queries), tokens=LEAST_TOKENS):
        decoder = _decoder(model, queries, [4] * len(queries))
        seen = [decoder.begin(), *(decoder.advance(tokens) for tokens in given[:2])]
        decoder.keep(torch.tensor([1], device=device))
        seen.append(decoder.advance(given[2][1:]))
    largest = 0.0
    for row, query in enumerate(queries):
        steps = len(given) if row == 1 else len(given) - 1
        written = torch.stack([tokens[row] for tokens in given[:steps]])
        if model.config.is_encoder_decoder:
            begin = torch.tensor([start_token(model)], device=device)
            tokens = torch.cat([begin, written])[None]
            plain = model(input_ids=query[None], decoder_input_ids=tokens, use_cache=False).logits[0]
        else:
            plain = model(input_ids=torch.cat([query, written])[None], use_cache=False).logits[0, len(query) - 1 :]
        decoded = torch.stack([logits[row if len(logits) > 1 else 0] for logits in seen[: steps + 1]])
        gap = (decoded.float() - plain.float()).square().mean(dim=-1).sqrt() / plain.float().std(dim=-1)
        largest = max(largest, gap.max().item())
    return largest
