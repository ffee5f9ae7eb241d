"""Checks the arguments of a `generate` call and decides whether our own decoding loop supports them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl.types import Sampling

# transformers' default `top_k`.
_DEFAULT_TOP_K = 50
# Settings, with their neutral values, that make `generate` sample from a distribution other than
# softmax(logits / temperature).
RESHAPING: dict[str, tuple[Any, ...]] = {
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

# Settings that our own decoding loop handles; any other falls back to `generate`.
_SUPPORTED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens", "min_new_tokens", "min_length",
    "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "num_return_sequences", "generation_config",
}  # fmt: skip
# Other settings that our own loop supports only at these neutral values.
_SUPPORTED_IF_NEUTRAL: dict[str, tuple[Any, ...]] = {
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
_BUILT_FROM_QUERIES = (
    "inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "encoder_outputs", "decoder_input_ids",
    "decoder_inputs_embeds", "decoder_attention_mask", "past_key_values",
)  # fmt: skip
# Arguments that prevent `generate` from returning one response per query: their allowed values, and the reason.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_return_sequences": ((None, 1), "generate returns one response per query: repeat a query to sample it again"),
    "return_dict_in_generate": ((None, False), "generate returns only tokens"),
    "custom_generate": ((None,), "it does not report where responses end"),
    "token_healing": ((None, False), "it would change the last tokens of the queries"),
    **dict.fromkeys(_BUILT_FROM_QUERIES, ((None,), "generate builds it from the queries")),
}


def effective(generation_config: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Resolves a setting as `generate` does: call arguments, then their `generation_config`, then the model's own."""
    if name in kwargs:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), generation_config):
        if (value := getattr(config, name, None)) is not None:
            return value
    return _DEFAULT_TOP_K if name == "top_k" else None


def check_sampling(generation_config: Any, kwargs: Mapping[str, Any]) -> None:
    """Rejects arguments with which `generate` cannot sample one response per query, and misspelt ones.

    Raises:
        ValueError: if an argument is rejected; the message names it and the reason, or the name that was meant.
    """
    for name in kwargs:
        if name in _REFUSED or hasattr(generation_config, name):
            continue
        # A name unlike any setting may be an argument of the model's forward, which transformers checks.
        if close := difflib.get_close_matches(name, [*_REFUSED, *vars(generation_config)], n=1, cutoff=0.85):
            raise ValueError(f"generate has no argument {name}: did you mean {close[0]}?")
    for name, (neutral, reason) in _REFUSED.items():
        value = effective(generation_config, kwargs, name)
        if not any(value is allowed or (isinstance(value, int) and value == allowed) for allowed in neutral):
            shown = f"={value!r}" if isinstance(value, int | str) else ""
            raise ValueError(f"{name}{shown} is not supported: {reason}")
    if effective(generation_config, kwargs, "cache_implementation") == "paged":
        raise ValueError("cache_implementation='paged' is not supported: its batches are not padded")
    temperature = effective(generation_config, kwargs, "temperature")
    if (
        temperature is not None
        and effective(generation_config, kwargs, "do_sample")
        and not (math.isfinite(temperature) and temperature > 0)
    ):
        raise ValueError(
            f"temperature={temperature!r} must be a finite number > 0; pass do_sample=False for greedy decoding"
        )
    max_new_tokens = effective(generation_config, kwargs, "max_new_tokens")
    if max_new_tokens is not None and (max_new_tokens < 1 or max_new_tokens != int(max_new_tokens)):
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a whole number of at least 1")


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
        limits = [int(length_sampler()) for _ in batches]
        if too_short := [limit for limit in limits if limit < 1]:
            raise ValueError(f"length_sampler drew {too_short[0]}, but a response needs at least 1 new token")
    elif (max_new_tokens := effective(generation_config, kwargs, "max_new_tokens")) is not None:
        limits = [int(max_new_tokens)] * len(batches)
    elif (max_length := effective(generation_config, kwargs, "max_length")) is not None:
        limits = [int(max_length) - (1 if is_encoder_decoder else max(batch)) for batch in batches]
    else:
        return None
    return [limit for limit, batch in zip(limits, batches, strict=True) for _ in batch]


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
        before = 1 if is_encoder_decoder else length
        if context is not None and before + limit > context:
            what = "the decoder's start token" if is_encoder_decoder else f"a query of {length} tokens"
            raise ValueError(
                f"query_tensor[{i}]: a response of max_new_tokens={limit} tokens after {what} would exceed the model's "
                f"context of {context} tokens; allow at most {max(0, context - before)} new tokens, or shorten the "
                "query"
            )


def stop_tokens(generation_config: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the token ids that end a response.

    Uses `eos_token_id` of the call, else of its `generation_config`, else of the model; negative ids are dropped.
    """
    eos = effective(generation_config, kwargs, "eos_token_id")
    ids = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
    return tuple(int(i) for i in ids if i >= 0)


def stop_strings(generation_config: Any, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the texts at which `generate` ends a response, from the same places as `stop_tokens`."""
    strings = effective(generation_config, kwargs, "stop_strings") or ()
    return (strings,) if isinstance(strings, str) else tuple(strings)


def unseen_by_scoring(generation_config: Any, kwargs: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """Returns the sampling settings, by name, that the update's logprobs ignore.

    A token sampled from a truncated or reshaped distribution is more likely there than under the full softmax, so the
    KL can come out negative and the ratio does not start at 1. Greedy decoding returns an empty dict.
    """
    if not effective(generation_config, kwargs, "do_sample"):
        return {}
    ignored = {}
    for name, neutral in RESHAPING.items():
        value = effective(generation_config, kwargs, name)
        if value not in neutral:
            ignored[name] = value
    for name in ("min_length", "min_new_tokens"):
        value = effective(generation_config, kwargs, name)
        if value is not None and value > 0 and stop_tokens(generation_config, kwargs):
            ignored[name] = value
    sampling_temperature = effective(generation_config, kwargs, "temperature")
    sampling_temperature = 1.0 if sampling_temperature is None else float(sampling_temperature)
    if sampling_temperature != temperature:
        ignored["temperature"] = sampling_temperature
    return ignored


def local_sampling(generation_config: Any, kwargs: Mapping[str, Any]) -> Sampling | str:
    """Returns the requested sampling distribution, or why our own loop does not support the call."""

    def value(name: str) -> Any:
        return effective(generation_config, kwargs, name)

    for name in kwargs:
        if name not in _SUPPORTED and name not in RESHAPING and name not in _SUPPORTED_IF_NEUTRAL:
            return f"only generate supports {name}"
    for name, neutral in (RESHAPING | _SUPPORTED_IF_NEUTRAL).items():
        if name not in ("top_k", "top_p", "min_p") and value(name) not in neutral:
            return f"{name}={value(name)!r}"
    if value("max_new_tokens") is None:
        return "max_new_tokens is not set"
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
