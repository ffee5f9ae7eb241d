"""Our own decoding loop: one uniform random number per row and token, recorded logprobs, and batch compaction.

It drives a plain transformers language model through its forward pass and a KV cache, and drops finished rows from the
batch. There is no list of supported models: `trl.rollout.self_check.obstacle` tries each one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trl.functional.probes import probe_tokens
from trl.functional.sampling import draw, sampling_logits
from trl.kernels.decode_attention import decoding
from trl.kernels.packed_weights import packed_weights
from trl.kernels.products import bucket_size
from trl.rollout.assembly import Side, assemble
from trl.rollout.decoders import Decoder, start_token
from trl.rollout.fixed_decoder import decoder_for
from trl.types import Rollout, Sampling

# Compact the batch once this fraction of its rows has finished: each compaction copies the KV cache of the others.
_COMPACT_SHARE = 0.25
# Logits processed at once when sampling on a CPU.
_CHUNK_LOGITS = 2**19
# Memory budget in bytes for KV cache and logits, within which batches may exceed the requested batch size.
_SPARE_MEMORY = 512 * 2**20
# Numbers that each model's KV cache holds per token, measured once: configs have no common names for heads and widths.
_CACHED_PER_TOKEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

# A context manager that yields a function returning the values `[b, T]` of the latest forward pass.
Critic = Callable[[], AbstractContextManager[Callable[[], Tensor] | None]]


class LocalEngine:
    """A `RolloutEngine` that decodes in this process, with the policy's own weights.

    Args:
        model: a language model for which `obstacle` returns None, in evaluation mode.
        pad_token: pads the rollout's tokens.
        side: side that the rollout is padded on.
        batch_size: queries decoded together; more where that costs little memory. Changes no response.
        critic: watches the critic's values during decoding; by default, the rollout has none.
        fixed_steps: decode in steps of fixed shapes, for a model whose `fixed_steps_obstacle` is None.
    """

    def __init__(
        self,
        model: Any,
        *,
        pad_token: int = 0,
        side: Side = "right",
        batch_size: int = 4,
        critic: Critic = nullcontext,
        fixed_steps: bool = False,
    ) -> None:
        self.model = model
        self.pad_token = pad_token
        self.side: Side = side
        self.batch_size = batch_size
        self.critic = critic
        self.fixed_steps = fixed_steps
        self.version = 0

    def update_weights(self, version: int) -> None:
        """Names the current weights; they need not be copied, since the engine reads the model's own."""
        self.version = version

    def generate(self, queries: Sequence[Tensor], sampling: Sampling) -> Rollout:
        """Samples one response per query, with its logprobs under the sampling distribution (0 if greedy).

        Args:
            queries: `B` 1-D token tensors.
            sampling: the request. One uniform is drawn per token, so that the same seed gives the same responses at any
                `batch_size`.

        Raises:
            ValueError: if `sampling.limits` does not have one entry per query, or has one below 1.
            RuntimeError: if logits are NaN or infinite.
        """
        count, limits = len(queries), sampling.limits
        if len(limits) != count:
            raise ValueError(f"Sampling.limits has {len(limits)} entries for {count} queries; expected one per query")
        if (least := min(limits)) < 1:
            raise ValueError(f"Sampling.limits contains {least}; every response needs at least 1 new token")
        generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
        # One row per token position, so that the draws do not depend on the largest limit.
        uniforms = torch.rand(max(limits), count, dtype=torch.float64, generator=generator, device="cpu")
        size = self._rows_at_once(max(len(query) for query in queries) + max(limits))
        order = sorted(range(count), key=lambda row: (len(queries[row]), limits[row]))
        sampled: dict[int, tuple[Tensor, ...]] = {}
        with self.critic() as values:
            for start in range(0, count, size):
                rows = order[start : start + size]
                part = sample(
                    self.model,
                    [queries[row] for row in rows],
                    sampling=sampling,
                    limits=[limits[row] for row in rows],
                    uniforms=uniforms[:, rows],
                    values=values,
                    fixed_steps=self.fixed_steps,
                )
                columns = [part.responses, part.logprobs, *([] if part.values is None else [part.values])]
                sampled |= zip(rows, zip(*columns, strict=True), strict=True)
        responses, logprobs, *critic = zip(*(sampled[row] for row in range(count)), strict=True)
        contexts, encoded = list(queries), None
        if self.model.config.is_encoder_decoder:
            contexts, encoded = [torch.tensor([start_token(self.model)])] * count, queries
        return assemble(
            contexts,
            responses,
            pad_token=self.pad_token,
            side=self.side,
            encoded=encoded,
            logprobs=logprobs,
            values=critic[0] if critic else None,
            policy_version=self.version,
        )

    def _rows_at_once(self, tokens: int) -> int:
        """Returns how many sequences of up to `tokens` tokens to decode as one batch."""
        embeddings = self.model.get_input_embeddings().weight
        per_row = embeddings.element_size() * _cached_per_token(self.model) * tokens + 16 * len(embeddings)
        return max(self.batch_size, self._spare_memory() // per_row)

    def _spare_memory(self) -> int:
        """Returns the bytes that a batch may take beyond the requested size: on a GPU, a quarter of what is free."""
        device = next(self.model.parameters()).device
        if device.type != "cuda":
            return _SPARE_MEMORY
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(_SPARE_MEMORY, (torch.cuda.mem_get_info(device)[0] + unused) // 4)


@torch.no_grad()
def _cached_per_token(model: Any) -> int:
    """Returns how many numbers a model's KV cache holds per token; its first call decodes one token."""
    if model not in _CACHED_PER_TOKEN:
        decoder = decoder_for(model, [torch.tensor(probe_tokens(len(model.get_input_embeddings().weight), 1))], [1])
        decoder.begin()
        _CACHED_PER_TOKEN[model] = decoder.cached_per_token()
    return _CACHED_PER_TOKEN[model]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Sampled responses with logprobs and values recorded during decoding; one list entry per query."""

    responses: list[Tensor]  # 1-D int64, including the stop token if one was sampled
    logprobs: list[Tensor]  # 1-D float32, under the sampling distribution; 0 if greedy
    values: list[Tensor] | None = None  # 1-D float32, of the state before each token


@torch.no_grad()
def sample(
    model: Any,
    queries: Sequence[Tensor],
    *,
    sampling: Sampling,
    limits: Sequence[int],
    uniforms: Tensor,
    values: Callable[[], Tensor] | None = None,
    fixed_steps: bool = False,
) -> Sampled:
    """Samples one response per query, as one batch.

    Args:
        model: a plain transformers language model, possibly with adapters, in evaluation mode.
        queries: `B` 1-D token tensors.
        sampling: sampling distribution and stop tokens; its limits and seed are not read.
        limits: maximum new tokens of each response; >= 1.
        uniforms: `[max(limits), B]` float64 in [0, 1): token `t` of row `b` is drawn with `uniforms[t, b]`, so that a
            response depends neither on the rest of its batch nor on the other responses' lengths.
        values: returns the values `[b, T]` of the latest forward pass; None records no values.
        fixed_steps: decode in steps of fixed shapes, as `LocalEngine` says.

    Returns:
        The sampled responses, without an encoder-decoder's start token.

    Raises:
        RuntimeError: if logits are NaN or infinite.
    """
    # For a single row, the attention kernel costs more than it saves.
    attention = decoding(model) if len(queries) > 1 else nullcontext()
    with attention, packed_weights(model, rows=len(queries), tokens=max(limits)):
        decoder = decoder_for(model, queries, limits, fixed_steps=fixed_steps)
        return _sample(decoder, queries, sampling, limits, uniforms, values)


def _sample(
    decoder: Decoder,
    queries: Sequence[Tensor],
    sampling: Sampling,
    limits: Sequence[int],
    uniforms: Tensor,
    values: Callable[[], Tensor] | None,
) -> Sampled:
    count, longest, last_tokens = len(queries), max(limits), set(limits)
    model, device = decoder.model, decoder.device
    stops = torch.tensor(sampling.stops, device=device)
    tokens = torch.zeros(longest, count, dtype=torch.int64, device=device)
    logprobs, critic = (torch.zeros(longest, count, device=device) for _ in range(2))
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    # One entry per row of the batch, which shrinks: the query's index, the limit, whether the row is unfinished.
    rows: Tensor | slice = slice(None)
    limit, uniforms = torch.tensor(list(limits), device=device), uniforms.to(device)
    unfinished, remaining = torch.ones(count, dtype=torch.bool, device=device), count
    raw = decoder.begin()
    for t in range(longest):
        chosen, chosen_logprobs = _choose(sampling, raw, t, uniforms[t])
        tokens[t, rows], logprobs[t, rows] = chosen, chosen_logprobs
        if values is not None:
            value = values()[:, -1].float()
            critic[t, rows] = value if decoder.copies is None else value[decoder.copies]
        if not sampling.stops and t + 1 not in last_tokens:  # no row ends here: do not wait for the device
            raw = decoder.advance(chosen)
            continue
        ended = limit <= t + 1
        if sampling.stops:
            ended |= torch.isin(chosen, stops)
        continuing = unfinished & ~ended
        before, remaining = remaining, int(continuing.sum())
        if remaining < before:
            indices = torch.arange(count, device=device)[rows]
            lengths[indices[unfinished & ended]] = t + 1
            if remaining == 0:
                break
            batch_rows = bucket_size(remaining, steps=4) if device.type == "cpu" else remaining
            dropped = len(limit) - batch_rows
            if dropped >= max(decoder.least_dropped_rows, _COMPACT_SHARE * len(limit)):
                # May include finished rows.
                survivors = continuing.logical_not().argsort(stable=True)[:batch_rows].sort().values
                decoder.keep(survivors)
                rows, chosen, continuing = indices[survivors], chosen[survivors], continuing[survivors]
                limit, uniforms = limit[survivors], uniforms[:, survivors]
        unfinished = continuing
        raw = decoder.advance(chosen)
    if bool((is_nan := logprobs.isnan()).any()):
        response_tokens, row = is_nan.nonzero()[0].tolist()
        raise RuntimeError(
            f"{type(model).__name__}: logits are NaN or infinite after {len(queries[row])} query tokens and {response_tokens} "
            f"response tokens; check that its weights ({next(model.parameters()).dtype}) are finite"
        )
    response_lengths = lengths.tolist()

    def trim(table: Tensor) -> list[Tensor]:
        return [row[:size].clone() for row, size in zip(table.t(), response_lengths, strict=True)]

    return Sampled(responses=trim(tokens), logprobs=trim(logprobs), values=None if values is None else trim(critic))


def _choose(sampling: Sampling, raw: Tensor, length: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Samples tokens `[b]` from raw logits `[b, V]` after `length` tokens; returns them and their logprobs `[b]`."""
    # On a CPU, in chunks that fit into its cache.
    chunk_rows = max(1, _CHUNK_LOGITS // raw.shape[1]) if raw.device.type == "cpu" else len(raw)
    if len(raw) <= chunk_rows:
        return _drawn(sampling, raw, length, uniforms)
    chunks = zip(raw.split(chunk_rows), uniforms.split(chunk_rows), strict=True)
    tokens, logprobs = zip(*(_drawn(sampling, logits, length, draws) for logits, draws in chunks), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _drawn(sampling: Sampling, raw: Tensor, length: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    logits = sampling_logits(raw, sampling, length)
    return _most_likely(logits) if sampling.greedy else draw(logits, uniforms)


def _most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the likeliest tokens `[b]` of logits `[b, V]`, and 0 as their logprobs, NaN if the largest is not finite."""
    tokens = logits.argmax(dim=-1)
    largest = logits.gather(-1, tokens[:, None]).squeeze(-1)
    return tokens, largest - largest
