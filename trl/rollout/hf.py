"""Samples with transformers' `generate`: beams, penalties, speculation, and models that our own loop cannot decode."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from trl.functional.probes import logits_error, logits_tolerance, probe_tokens
from trl.rollout.assembly import Side, assemble, padded
from trl.rollout.generation_settings import RESHAPING, effective, stop_tokens
from trl.types import Rollout, Sampling

logger = logging.getLogger(__name__)

_CACHE_CHECKS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class TransformersEngine:
    """A `RolloutEngine` on transformers' `generate`. Its rollouts have no logprobs and no values.

    Args:
        model: a language model, possibly with a value head, in evaluation mode.
        tokenizer: finds `stop_strings`, unless `arguments` has a tokenizer.
        pad_token: pads queries and the rollout's tokens.
        side: side that the rollout is padded on.
        batch_size: queries per `generate` call.
        pads: whether queries of different lengths may share a call. Models that our own loop supports are known to
            ignore padding; others may feed it into a recurrent state, or count positions from the first column.
        arguments: arguments of `generate`, for what a `Sampling` cannot express. They override the request, except its
            limits and seed.
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        pad_token: int = 0,
        side: Side = "right",
        batch_size: int = 4,
        pads: bool = True,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token = pad_token
        self.side: Side = side
        self.batch_size = batch_size
        self.pads = pads
        self.arguments = arguments
        self.version = 0

    def update_weights(self, version: int) -> None:
        """Names the current weights; they need not be copied, since the engine reads the model's own."""
        self.version = version

    @torch.no_grad()
    def generate(self, queries: Sequence[Tensor], sampling: Sampling) -> Rollout:
        """Samples one response per query. Each ends at its stop token (kept), stop string, stopping criterion or limit.

        Args:
            queries: `B` 1-D token tensors.
            sampling: the request. Without limits, `arguments` and the model's generation config determine the maximum
                lengths.
        """
        model, device = self.model, next(self.model.parameters()).device
        seq2seq = model.config.is_encoder_decoder
        kwargs = _generate_arguments(sampling, self.pad_token) if self.arguments is None else dict(self.arguments)
        if not self.pads and kwargs.get("use_cache") is None and not _cache_is_exact(model):
            kwargs["use_cache"] = False
        if effective(model.generation_config, kwargs, "stop_strings"):
            kwargs.setdefault("tokenizer", self.tokenizer)
        pairs: dict[int, tuple[Tensor, Tensor]] = {}  # row -> context and response
        with _seeded(sampling.seed, device):
            for rows in self._batches(queries, sampling.limits or [None] * len(queries)):
                if sampling.limits:
                    kwargs["max_new_tokens"] = sampling.limits[rows[0]]
                # On the left for decoders, so that responses follow queries.
                tokens, attention = padded(
                    [queries[row] for row in rows], self.pad_token, "right" if seq2seq else "left"
                )
                inputs = {"input_ids": tokens.to(device), "attention_mask": attention.long().to(device)}
                call_arguments = dict(kwargs)
                criteria, recorder = _criteria(model, call_arguments, stop_tokens(model.generation_config, kwargs))
                call_arguments |= {"stopping_criteria": criteria, "return_dict_in_generate": True}
                generated = model.generate(**inputs, **call_arguments)
                width = 1 if seq2seq else tokens.shape[1]
                row_lengths = _row_lengths(model, generated, recorder, width)
                for row, row_tokens, size in zip(rows, generated.sequences, row_lengths, strict=True):
                    pairs[row] = (row_tokens[:width] if seq2seq else queries[row], row_tokens[width:size])
        contexts, responses = zip(*(pairs[row] for row in range(len(queries))), strict=True)
        return assemble(
            contexts,
            responses,
            pad_token=self.pad_token,
            side=self.side,
            encoded=queries if seq2seq else None,
            policy_version=self.version,
        )

    def _batches(self, queries: Sequence[Tensor], limits: Sequence[Any]) -> Iterator[list[int]]:
        """Yields indices of up to `batch_size` queries with one limit: in order or, without `pads`, of one length."""
        groups: dict[Any, list[int]] = {}
        for row, query in enumerate(queries):
            groups.setdefault((row // self.batch_size if self.pads else len(query), limits[row]), []).append(row)
        for rows in groups.values():
            yield from (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))


def _generate_arguments(sampling: Sampling, pad_token: int) -> dict[str, Any]:
    """Returns the request as arguments of `generate`, which override the model's whole generation config."""
    arguments: dict[str, Any] = dict.fromkeys(RESHAPING) | {
        "do_sample": not sampling.greedy,
        "num_beams": 1,
        "eos_token_id": list(sampling.stops) or None,
        "pad_token_id": pad_token,
        "stop_strings": None,
    }
    arguments |= {"min_new_tokens": sampling.least_tokens} if sampling.least_tokens else {"min_length": None}
    if not sampling.greedy:
        arguments |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        arguments |= {"min_p": sampling.min_p or None}
    return arguments


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators, which `generate` uses, and restores them; does nothing for None."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _LengthRecorder(StoppingCriteria):
    """Records the length at which stopping criteria end each row; `generate` may keep extending finished rows.

    Args:
        custom: criteria that `generate` evaluates only through this one.
        builtin: criteria that `generate` also evaluates itself.
    """

    def __init__(self, custom: Sequence[Any], builtin: Sequence[Any]) -> None:
        self.custom, self.builtin = custom, builtin
        self.lengths: Tensor | None = None  # [rows], including the prompt
        self._running: Tensor | None = None  # [rows]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns bools `[rows]`: whether a `custom` criterion ends the row here."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.custom:
            done = done | criterion(input_ids, scores, **kwargs)
        ended = done
        for criterion in self.builtin:
            ended = ended | criterion(input_ids, scores, **kwargs)
        if self.lengths is None or self._running is None:
            self.lengths, self._running = torch.zeros_like(done, dtype=torch.int64), torch.ones_like(done)
        self.lengths[self._running] = input_ids.shape[1]
        self._running = self._running & ~ended
        return done


def _criteria(model: Any, kwargs: dict[str, Any], stops: Sequence[int]) -> tuple[StoppingCriteriaList, _LengthRecorder]:
    """Pops stopping criteria from `kwargs`; returns those for `generate`, and the one that records row ends."""
    criteria = list(kwargs.pop("stopping_criteria", None) or ())
    # `generate` uses criteria of these types instead of building its own.
    native_types = (EosTokenCriteria, StopStringCriteria, MaxLengthCriteria, MaxTimeCriteria)
    native = [c for c in criteria if type(c) in native_types]
    builtin = [c for c in native if type(c) in (EosTokenCriteria, StopStringCriteria)]
    builtin_types = {type(c) for c in builtin}
    if stops and EosTokenCriteria not in builtin_types:
        builtin.append(EosTokenCriteria(eos_token_id=list(stops)))
    strings = effective(model.generation_config, kwargs, "stop_strings")
    if strings and StopStringCriteria not in builtin_types:
        builtin.append(StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings))
    recorder = _LengthRecorder([c for c in criteria if c not in native], builtin)
    return StoppingCriteriaList([*native, recorder]), recorder


def _row_lengths(model: Any, generated: Any, recorder: _LengthRecorder, before: int) -> list[int]:
    """Returns the length of each row that `generate` returned, without padding and including `before` input tokens."""
    sequences = generated.sequences
    if getattr(generated, "beam_indices", None) is not None:  # the source beam of each token; -1 after the end
        return [before + n for n in (generated.beam_indices >= 0).sum(dim=1).tolist()]
    if len(sequences) == 1:  # a single row has no padding
        return [sequences.shape[1]]
    if recorder.lengths is None:
        raise RuntimeError(f"{type(model).__name__}.generate ignores stopping_criteria: response lengths are unknown")
    return recorder.lengths.clamp(max=sequences.shape[1]).tolist()


@torch.no_grad()
def _cache_is_exact(model: Any) -> bool:
    """Whether `generate` with a cache reproduces the logits of uncached forward passes; checked once per model.

    Generates from two rows of three tokens, then of one: this also detects state left over from the first call.
    """
    pretrained = getattr(model, "pretrained_model", model)
    if pretrained not in _CACHE_CHECKS:
        embeddings = pretrained.get_input_embeddings().weight
        probes = probe_tokens(len(embeddings), 6)
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_length": None}
        settings |= {"min_new_tokens": 4, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
        outputs = []
        for width in (3, 1):
            tokens = torch.tensor([probes[:width], probes[3 : 3 + width]], device=embeddings.device)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            outputs.append((inputs, width, pretrained.generate(**inputs, **settings)))
        error = 0.0
        for inputs, width, generated in outputs:
            sequences = generated.sequences
            if pretrained.config.is_encoder_decoder:
                logits, start = pretrained(**inputs, decoder_input_ids=sequences, use_cache=False).logits, 0
            else:
                logits, start = pretrained(input_ids=sequences, use_cache=False).logits, width - 1
            expected = logits[:, start : start + len(generated.logits)]
            error = max(error, logits_error(torch.stack(generated.logits, dim=1), expected))
        _CACHE_CHECKS[pretrained] = error <= logits_tolerance(embeddings)
        if not _CACHE_CHECKS[pretrained]:
            logger.warning(
                "%s: generate runs without its key-value cache, which changes the logits by %.1e standard deviations",
                type(pretrained).__name__,
                error,
            )
    return _CACHE_CHECKS[pretrained]
