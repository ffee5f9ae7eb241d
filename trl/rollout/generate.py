"""Samples responses with the native decoding loop where it supports the model, else with transformers' `generate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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

from trl.rollout.engine import CHECK_TOLERANCE, Sampled, Sampling, sample, start_token

logger = logging.getLogger(__name__)

# transformers' default `top_k`.
_DEFAULT_TOP_K = 50
# Memory budget in bytes for KV cache and logits, within which batches may exceed the requested batch size.
_FREE_MEMORY = 512 * 2**20

# Settings, with their neutral values, that make `generate` sample from other than softmax(logits / temperature).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "num_beams": (None, 1),
    "logits_processor": (None, []),
    "prefix_allowed_tokens_fn": (None,),
    "watermarking_config": (None,),
    "assistant_ensemble_weight": (None,),
}

_CACHES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

# Settings that the native decoding loop handles; any other falls back to `generate`.
_OWN = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "min_new_tokens", "min_length",
    "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "num_return_sequences",
}  # fmt: skip
# Other settings that the native loop supports only at these neutral values.
_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "stop_strings": (None,),
    "max_time": (None,),
    "penalty_alpha": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "cache_implementation": (None,),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "return_dict_in_generate": (None, False),
}
# Arguments of `generate` that are built from the queries, so that callers may not pass them.
_MADE = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_outputs", "decoder_input_ids",
    "decoder_inputs_embeds", "decoder_attention_mask", "past_key_values",
)  # fmt: skip
# Arguments that prevent `generate` from returning one response per query: their allowed values, and the reason.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_return_sequences": ((None, 1), "generate returns one response per query: repeat a query to sample it again"),
    "return_dict_in_generate": ((None, False), "generate returns tokens alone"),
    "custom_generate": ((None,), "where its responses end is unknown"),
    "token_healing": ((None, False), "it would exchange the last tokens of the queries"),
    **dict.fromkeys(_MADE, ((None,), "generate makes it of the queries")),
}


def _effective(generation_config: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Resolves a setting as `generate` does: call arguments, then their `generation_config`, then the model's own."""
    if name in kwargs:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), generation_config):
        if (value := getattr(config, name, None)) is not None:
            return value
    return _DEFAULT_TOP_K if name == "top_k" else None


def check_sampling(generation_config: Any, kwargs: Mapping[str, Any]) -> None:
    """Rejects arguments with which `generate` cannot sample one response per query.

    Raises:
        ValueError: if an argument is rejected; the message names it and the reason.
    """
    for name, (neutral, reason) in _REFUSED.items():
        value = _effective(generation_config, kwargs, name)
        if not any(value is one or (isinstance(value, int) and value == one) for one in neutral):
            shown = f"={value!r}" if isinstance(value, int | str) else ""
            raise ValueError(f"{name}{shown} cannot be asked for: {reason}")
    if _effective(generation_config, kwargs, "cache_implementation") == "paged":
        raise ValueError("cache_implementation='paged' cannot be asked for: its batches are not padded")
    temperature = _effective(generation_config, kwargs, "temperature")
    if (
        temperature is not None
        and _effective(generation_config, kwargs, "do_sample")
        and not (math.isfinite(temperature) and temperature > 0)
    ):
        raise ValueError(
            f"temperature={temperature!r} must be a finite number > 0; do_sample=False takes the likeliest token"
        )
    longest = _effective(generation_config, kwargs, "max_new_tokens")
    if longest is not None and (longest < 1 or longest != int(longest)):
        raise ValueError(f"max_new_tokens={longest!r} must be a whole number of at least 1")


def new_token_limits(
    generation_config: Any,
    kwargs: Mapping[str, Any],
    lengths: Sequence[int],
    *,
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    is_encoder_decoder: bool,
) -> list[int] | None:
    """Returns the maximum new tokens of each response, or None if only the default of `generate` sets it.

    Args:
        generation_config: the model's generation config.
        kwargs: arguments of the sampling call.
        lengths: query lengths in tokens.
        batch_size: number of queries that share one draw of `length_sampler`, or a padded width for `max_length`.
        length_sampler: draws the limit of each batch, overriding `kwargs`.
        is_encoder_decoder: if True, `max_length` counts the decoder's start token instead of the query.

    Raises:
        ValueError: if the sampler draws less than one token.
    """
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    if length_sampler is not None:
        drawn = [int(length_sampler()) for _ in batches]
        if wrong := [number for number in drawn if number < 1]:
            raise ValueError(f"length_sampler drew {wrong[0]}: a response has at least 1 new token")
    elif (longest := _effective(generation_config, kwargs, "max_new_tokens")) is not None:
        drawn = [int(longest)] * len(batches)
    elif (total := _effective(generation_config, kwargs, "max_length")) is not None:
        drawn = [int(total) - (1 if is_encoder_decoder else max(batch)) for batch in batches]
    else:
        return None
    return [number for number, batch in zip(drawn, batches, strict=True) for _ in batch]


def check_context(
    lengths: Sequence[int], limits: Sequence[int], context: int | None, *, is_encoder_decoder: bool
) -> None:
    """Checks that every response, at its maximum length, fits into the model's context.

    Args:
        lengths: query lengths in tokens.
        limits: maximum new tokens of each response.
        context: the decoder's context length in tokens; None for no limit.
        is_encoder_decoder: if True, the decoder reads a start token instead of the query.

    Raises:
        ValueError: if a response may not fit; the message describes the first.
    """
    for i, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        before, what = (1, "the decoder's start token") if is_encoder_decoder else (length, f"{length} of the query")
        if context is not None and before + limit > context:
            raise ValueError(
                f"query_tensor[{i}]: a response of up to max_new_tokens={limit} tokens after {what} may pass the model's "
                f"context of {context} tokens: ask for at most {max(0, context - before)} new tokens, or shorten the query"
            )


def stop_tokens(generation_config: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the token ids that end a response.

    Uses `eos_token_id` of the call, else of its `generation_config`, else of the model; negative ids are dropped.
    """
    eos = _effective(generation_config, kwargs, "eos_token_id")
    ids = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
    return tuple(int(i) for i in ids if i >= 0)


def stop_strings(generation_config: Any, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts at which `generate` ends a response, likewise."""
    strings = _effective(generation_config, kwargs, "stop_strings") or ()
    return (strings,) if isinstance(strings, str) else tuple(strings)


def unseen_by_scoring(generation_config: Any, kwargs: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """Returns the sampling settings, by name, that the update's logprobs ignore.

    A token sampled from a truncated or reshaped distribution is more likely there than under the full softmax, so the
    KL can come out negative and the ratio does not start at 1. Greedy decoding returns an empty dict.
    """
    if not _effective(generation_config, kwargs, "do_sample"):
        return {}
    found = {}
    for name, neutral in _NEUTRAL.items():
        value = _effective(generation_config, kwargs, name)
        if value not in neutral:
            found[name] = value
    for name in ("min_length", "min_new_tokens"):
        value = _effective(generation_config, kwargs, name)
        if value is not None and value > 0 and stop_tokens(generation_config, kwargs):
            found[name] = value
    sampled_at = _effective(generation_config, kwargs, "temperature")
    sampled_at = 1.0 if sampled_at is None else float(sampled_at)
    if sampled_at != temperature:
        found["temperature"] = sampled_at
    return found


def own_sampling(generation_config: Any, kwargs: Mapping[str, Any]) -> Sampling | str:
    """Returns the requested sampling distribution, or why the native loop does not support the call."""

    def value(name: str) -> Any:
        return _effective(generation_config, kwargs, name)

    for name in kwargs:
        if name not in _OWN and name not in _NEUTRAL and name not in _ELSEWHERE:
            return f"{name} is a setting that only generate knows"
    for name, neutral in (_NEUTRAL | _ELSEWHERE).items():
        if name not in ("top_k", "top_p", "min_p") and value(name) not in neutral:
            return f"{name}={value(name)!r}"
    if value("max_new_tokens") is None:
        return "max_new_tokens is not given"
    if (value("min_length") or 0) > 0 and value("min_new_tokens") is None:
        return f"min_length={value('min_length')} counts the padding of a batch"
    return Sampling(
        greedy=not value("do_sample"),
        temperature=1.0 if value("temperature") is None else float(value("temperature")),
        top_k=int(value("top_k") or 0),
        top_p=1.0 if value("top_p") is None else float(value("top_p")),
        min_p=0.0 if value("min_p") is None else float(value("min_p")),
        stops=stop_tokens(generation_config, kwargs),
        least_tokens=max(0, int(value("min_new_tokens") or 0)),
    )


def _rows_at_once(model: Any, batch_size: int, tokens: int) -> int:
    """Returns the number of queries to sample as one batch: `batch_size`, or more within `_FREE_MEMORY`."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = model.get_input_embeddings().weight.element_size()
    per_row = 2 * size * heads * width * config.num_hidden_layers * tokens + 16 * config.vocab_size
    return max(batch_size, _FREE_MEMORY // per_row)


def sample_responses(
    model: Any,
    queries: Sequence[Tensor],
    *,
    sampling: Sampling,
    limits: Sequence[int],
    batch_size: int,
    generator: torch.Generator,
    values: Callable[[], AbstractContextManager[Callable[[], Tensor] | None]] = nullcontext,
) -> Sampled:
    """Samples one response per query with the native decoding loop.

    Args:
        model: a language model for which `obstacle` returns None, in evaluation mode.
        queries: `N` 1-D token tensors.
        sampling: sampling distribution and stop tokens.
        limits: maximum new tokens of each response; >= 1.
        batch_size: queries per batch; more where that costs little memory.
        generator: draws one uniform per token. The same state gives the same responses at any `batch_size`.
        values: returns a context manager that yields a function returning the values `[b, T]` of the latest forward
            pass, or None to record no values.

    Returns:
        One entry per query, in input order, on the model's device.

    Raises:
        ValueError: if a limit is below 1.
    """
    count = len(queries)
    if wrong := [limit for limit in limits if limit < 1]:
        raise ValueError(f"a response of at most {wrong[0]} new tokens is asked for: it must be at least 1")
    # One row per token position, so that the draws do not depend on the largest limit.
    uniforms = torch.rand(max(limits), count, dtype=torch.float64, generator=generator)
    rows = _rows_at_once(model, batch_size, max(len(query) for query in queries) + max(limits))
    order = sorted(range(count), key=lambda row: (len(queries[row]), limits[row]))
    parts: list[Sampled] = []
    with values() as critic:
        for start in range(0, count, rows):
            some = order[start : start + rows]
            parts.append(
                sample(
                    model,
                    [queries[row] for row in some],
                    sampling=sampling,
                    limits=[limits[row] for row in some],
                    uniforms=uniforms[:, some],
                    values=critic,
                )
            )
    back = torch.tensor(order).argsort().tolist()

    def joined(name: str) -> list[Tensor]:
        tensors = [tensor for part in parts for tensor in getattr(part, name)]
        return [tensors[row] for row in back]

    return Sampled(
        responses=joined("responses"),
        logprobs=joined("logprobs"),
        values=None if parts[0].values is None else joined("values"),
    )


def with_prompts(
    model: Any, queries: Sequence[Tensor], responses: Sequence[Tensor], *, return_prompt: bool
) -> list[Tensor]:
    """Prepends the start token (encoder-decoders) or, with `return_prompt`, the query (decoders) to each response."""
    if model.config.is_encoder_decoder:
        return [torch.cat([r.new_tensor([start_token(model)]), r]) for r in responses]
    if return_prompt:
        return [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses, strict=True)]
    return list(responses)


class _Ends(StoppingCriteria):
    """Records the length at which stopping criteria end each row; `generate` may keep extending finished rows.

    Args:
        asked: criteria that `generate` evaluates only through this one.
        watched: criteria that `generate` also evaluates itself.
    """

    def __init__(self, asked: Sequence[Any], watched: Sequence[Any]) -> None:
        self.asked, self.watched = asked, watched
        self.lengths: Tensor | None = None  # [rows], including the prompt
        self._running: Tensor | None = None  # [rows]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns bools `[rows]`: whether an `asked` criterion ends the row here."""
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for criterion in self.asked:
            done = done | criterion(input_ids, scores, **kwargs)
        ended = done
        for criterion in self.watched:
            ended = ended | criterion(input_ids, scores, **kwargs)
        if self.lengths is None or self._running is None:
            self.lengths, self._running = torch.zeros_like(done, dtype=torch.int64), torch.ones_like(done)
        self.lengths[self._running] = input_ids.shape[1]
        self._running = self._running & ~ended
        return done


def _criteria(model: Any, kwargs: dict[str, Any], stops: Sequence[int]) -> tuple[StoppingCriteriaList, _Ends]:
    """Pops stopping criteria from `kwargs`; returns those for `generate`, and the one that records row ends."""
    given = list(kwargs.pop("stopping_criteria", None) or ())
    # `generate` uses criteria of these types instead of building its own.
    known = [
        one for one in given if type(one) in (EosTokenCriteria, StopStringCriteria, MaxLengthCriteria, MaxTimeCriteria)
    ]
    watched = [one for one in known if type(one) in (EosTokenCriteria, StopStringCriteria)]
    kinds = {type(one) for one in watched}
    if stops and EosTokenCriteria not in kinds:
        watched.append(EosTokenCriteria(eos_token_id=list(stops)))
    strings = _effective(model.generation_config, kwargs, "stop_strings")
    if strings and StopStringCriteria not in kinds:
        watched.append(StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings))
    ends = _Ends([one for one in given if one not in known], watched)
    return StoppingCriteriaList([*known, ends]), ends


def _sizes(model: Any, generated: Any, ends: _Ends, before: int) -> list[int]:
    """Returns the length of each row that `generate` returned, without padding and including `before` input tokens."""
    sequences = generated.sequences
    if getattr(generated, "beam_indices", None) is not None:  # the source beam of each token; -1 after the end
        return [before + n for n in (generated.beam_indices >= 0).sum(dim=1).tolist()]
    if len(sequences) == 1:  # a single row has no padding
        return [sequences.shape[1]]
    if ends.lengths is None:
        name = type(model).__name__
        raise RuntimeError(f"generate of {name} asks no stopping criteria, so that the ends of responses are unknown")
    return ends.lengths.clamp(max=sequences.shape[1]).tolist()


@torch.no_grad()
def _caches(model: Any) -> bool:
    """Whether `generate` with a cache reproduces the logits of uncached forward passes; checked once per model.

    Generates from two rows of three tokens, then of one: this also detects state left over from the first call.
    """
    plain = getattr(model, "pretrained_model", model)
    if plain not in _CACHES:
        words = plain.get_input_embeddings().weight
        word = [len(words) // 2 + i % max(1, len(words) // 4) for i in range(6)]
        asked: dict[str, Any] = {"do_sample": False, "num_beams": 1, "min_new_tokens": 4, "max_new_tokens": 4}
        asked |= {"output_logits": True, "return_dict_in_generate": True, "max_length": None, "num_return_sequences": 1}
        made = []
        for width in (3, 1):
            tokens = torch.tensor([word[:width], word[3 : 3 + width]], device=words.device)
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            made.append((inputs, width, plain.generate(**inputs, **asked)))
        largest = 0.0
        for inputs, width, found in made:
            if plain.config.is_encoder_decoder:
                again, start = plain(**inputs, decoder_input_ids=found.sequences, use_cache=False).logits, 0
            else:
                again, start = plain(input_ids=found.sequences, use_cache=False).logits, width - 1
            expected = again[:, start : start + len(found.logits)].float()
            seen = torch.stack(found.logits, dim=1).float()
            gap = (seen - expected).square().mean(dim=-1).sqrt() / expected.std(dim=-1)
            largest = max(largest, gap.max().item())
        _CACHES[plain] = largest <= CHECK_TOLERANCE.get(words.element_size(), 0.5)
        if not _CACHES[plain]:
            logger.warning(
                "%s: generate reads the whole sequence again for each token: with its cache, logits are off by %.1e standard "
                "deviations",
                type(plain).__name__,
                largest,
            )
    return _CACHES[plain]


@torch.no_grad()
def generate_responses(
    model: Any,
    queries: Sequence[Tensor],
    *,
    collate: Callable[[list[dict[str, Tensor]], str], Mapping[str, Tensor]],
    is_encoder_decoder: bool,
    batch_size: int,
    return_prompt: bool,
    limits: Sequence[int] | None,
    tokenizer: Any,
    generation_kwargs: Mapping[str, Any],
    pads: bool = True,
) -> list[Tensor]:
    """Samples one response per query with `generate`.

    Args:
        model: has `generate`, `generation_config` and parameters.
        queries: 1-D token tensors.
        collate: pads a list of `{"input_ids"}` on a side ("left" for decoders, so that responses follow queries).
        is_encoder_decoder: if True, responses begin with the decoder's start token.
        batch_size: queries per `generate` call.
        return_prompt: prepend the query to the response (decoders only).
        limits: `max_new_tokens` of each query, the same within a batch; None leaves it to `generation_kwargs`.
        tokenizer: finds `stop_strings`, unless `generation_kwargs` has a tokenizer.
        generation_kwargs: arguments of `generate`.
        pads: whether queries of different lengths may share a batch. Models that the native loop drives are known to
            ignore padding; others may feed it into a recurrent state, or count positions from the first column.

    Returns:
        1-D tensors of generated tokens without padding, one per query. Each ends at its stop token (kept), stop string,
        stopping criterion or limit.
    """
    device = next(model.parameters()).device
    kwargs = dict(generation_kwargs)
    if not pads and kwargs.get("use_cache") is None and not _caches(model):
        kwargs["use_cache"] = False
    if _effective(model.generation_config, kwargs, "stop_strings"):
        kwargs.setdefault("tokenizer", tokenizer)
    responses: dict[int, Tensor] = {}
    for rows in _batches(queries, limits or [None] * len(queries), batch_size, pads):
        if limits is not None:
            kwargs["max_new_tokens"] = limits[rows[0]]
        batch = collate([{"input_ids": queries[row]} for row in rows], "right" if is_encoder_decoder else "left")
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        given = dict(kwargs)
        criteria, ends = _criteria(model, given, stop_tokens(model.generation_config, kwargs))
        given |= {"stopping_criteria": criteria, "return_dict_in_generate": True}
        generated = model.generate(**inputs, **given)
        width = 1 if is_encoder_decoder else inputs["input_ids"].shape[1]
        for row, tokens, size in zip(rows, generated.sequences, _sizes(model, generated, ends, width), strict=True):
            response = tokens[int(not is_encoder_decoder) * width : size]
            if return_prompt and not is_encoder_decoder:
                response = torch.cat([queries[row].to(device), response])
            responses[row] = response
    return [responses[row] for row in range(len(queries))]


def _batches(queries: Sequence[Tensor], limits: Sequence[Any], batch_size: int, pads: bool) -> Iterator[list[int]]:
    """Yields indices of up to `batch_size` queries: in order or, without `pads`, grouped by equal length and limit."""
    groups: dict[Any, list[int]] = {}
    for row, query in enumerate(queries):
        groups.setdefault(row // batch_size if pads else (len(query), limits[row]), []).append(row)
    for rows in groups.values():
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
