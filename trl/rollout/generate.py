"""Responses by `transformers`' own `generate`, a batch at a time, with the padding taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What makes `generate` sample from another distribution than softmax(logits / temperature), and the value that does not.
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
}


def _effective(generation_config: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    return kwargs[name] if name in kwargs else getattr(generation_config, name, None)


def stop_tokens(generation_config: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids at which `generate` ends a response: `eos_token_id` of the call, else of the model; negative ones are off."""
    eos = _effective(generation_config, kwargs, "eos_token_id")
    ids = [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist()
    return tuple(int(i) for i in ids if i >= 0)


def unseen_by_scoring(generation_config: Any, kwargs: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The settings of a sampling call that the log-probabilities of the update will not know of, by name.

    A token sampled from a cut or reshaped distribution is more likely there than under the full softmax, so that the
    KL comes out negative and the ratio starts off 1. Greedy decoding is not sampling and gives an empty result.
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


def _cut(response: Tensor, stops: Iterable[int]) -> Tensor:
    """Up to and with the first stop token: what `generate` writes behind it is padding."""
    if stops := tuple(stops):
        ends = torch.isin(response, torch.tensor(stops, device=response.device)).nonzero()
        if len(ends):
            return response[: int(ends[0]) + 1]
    return response


@torch.no_grad()
def generate_responses(
    model: Any,
    queries: Sequence[Tensor],
    *,
    collate: Callable[[list[dict[str, Tensor]], str], Mapping[str, Tensor]],
    is_encoder_decoder: bool,
    batch_size: int,
    return_prompt: bool,
    length_sampler: Callable[[], int] | None,
    generation_kwargs: Mapping[str, Any],
) -> list[Tensor]:
    """Samples one response per query.

    Args:
        model: has `generate`, `generation_config` and parameters.
        queries: 1-D token tensors.
        collate: pads a list of `{"input_ids"}` on a side ("left" for decoders, so that responses follow queries).
        is_encoder_decoder: then the response begins with the decoder's start token.
        batch_size: queries per call of `generate`.
        return_prompt: put the query before the response (decoders).
        length_sampler: draws `max_new_tokens` for each call of `generate`.
        generation_kwargs: for `generate`.

    Returns:
        1-D tensors without padding, ending with the stop token where one was sampled.
    """
    device = next(model.parameters()).device
    kwargs = dict(generation_kwargs)
    responses: list[Tensor] = []
    stops = stop_tokens(model.generation_config, kwargs)
    for start in range(0, len(queries), batch_size):
        chunk = list(queries[start : start + batch_size])
        if length_sampler is not None:
            kwargs["max_new_tokens"] = length_sampler()
        batch = collate([{"input_ids": query} for query in chunk], "right" if is_encoder_decoder else "left")
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        generated = model.generate(**inputs, **kwargs)
        width = 1 if is_encoder_decoder else inputs["input_ids"].shape[1]
        for query, row in zip(chunk, generated, strict=True):
            response = _cut(row[width:], stops)
            if is_encoder_decoder:
                response = torch.cat([row[:1], response])
            elif return_prompt:
                response = torch.cat([query.to(device), response])
            responses.append(response)
    return responses
