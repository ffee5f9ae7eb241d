"""Checks by trial whether our own decoding loop supports a model; there is no list of models."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from trl.errors import is_out_of_memory
from trl.functional.probes import logits_error, logits_tolerance, probe_tokens
from trl.kernels.decode_attention import decoding
from trl.kernels.decode_graph import no_waiting
from trl.kernels.door import SWITCH, kernels_enabled
from trl.kernels.kv_cache import GrowingLayer, growing_cache
from trl.kernels.packed_weights import LEAST_TOKENS, packed_weights
from trl.rollout.decoders import start_token
from trl.rollout.fixed_decoder import decoder_for
from trl.rollout.local import LocalEngine
from trl.types import Sampling

logger = logging.getLogger(__name__)


def obstacle(model: Any) -> str | None:
    """Returns why `LocalEngine` does not support a model, or None if it does.

    Decodes a few tokens after two short prompts of different lengths and compares the logits with plain forward passes
    over each sequence, without cache and padding; then lets a `LocalEngine` sample. A model that fails with an error is logged
    as a warning.

    Raises:
        RuntimeError: if memory runs out, which says nothing about the model.
    """
    name = type(model).__name__
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if not callable(supports) or not supports() or getattr(model, "_is_stateful", False):
        return f"{name} does not keep its state in a key-value cache"
    if not model.config.is_encoder_decoder:
        kinds = {type(layer) for layer in growing_cache(model.config).layers}
        if unsupported := kinds - {GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}:
            return f"{name} has unsupported cache layers: {', '.join(sorted(kind.__name__ for kind in unsupported))}"
    return _failure(model, "step by step", fixed_steps=False)


def fixed_steps_obstacle(model: Any) -> str | None:
    """Returns why a model for which `obstacle` is None cannot decode in steps of fixed shapes, or None if it can.

    Such steps are for GPUs (`trl.kernels.decode_graph`); the same trial as for `obstacle` decides.

    Raises:
        RuntimeError: if memory runs out.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if not kernels_enabled():
        return f"{SWITCH} is off"
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return f"{name} runs attention {config._attn_implementation!r}"
    return _failure(model, "in steps of fixed shapes", fixed_steps=True)


def _failure(model: Any, how: str, *, fixed_steps: bool) -> str | None:
    """Returns what is wrong with decoding, or None."""
    name = type(model).__name__
    try:
        difference = _decoding_error(model, fixed_steps=fixed_steps)
        if not difference <= logits_tolerance(model.get_input_embeddings().weight):
            return f"{name}: logits decoded {how} differ from a forward pass by {difference:.1e} standard deviations"
        probes = torch.tensor(probe_tokens(len(model.get_input_embeddings().weight), 8))
        LocalEngine(model, fixed_steps=fixed_steps).generate([probes[:3], probes[3:]], Sampling(limits=(1, 2), seed=0))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{name} fails when decoded {how}: {type(error).__name__}: {error}"
        if not fixed_steps:  # a model without fixed steps is common, and the same loop then decodes it step by step
            logger.warning("our decoding loop failed and is not used: %s", reason)
        return reason
    return None


@torch.no_grad()
def _decoding_error(model: Any, *, fixed_steps: bool) -> float:
    """Returns the `logits_error` of decoding against plain forward passes."""
    device = next(model.parameters()).device
    probes = torch.tensor(probe_tokens(len(model.get_input_embeddings().weight), 12), device=device)
    queries = [probes[:3], probes[3:8]]
    appended = [probes[8:10], probes[10:], probes[[0, 5]], probes[[1, 6]]]  # one token per row and step
    with decoding(model), packed_weights(model, rows=len(queries), tokens=LEAST_TOKENS):
        decoder = decoder_for(model, queries, [4] * len(queries), fixed_steps=fixed_steps)
        step_logits = [decoder.begin()]
        with no_waiting(device) if fixed_steps else nullcontext():  # before a capture would fail
            step_logits.append(decoder.advance(appended[0]).clone())
        step_logits += [decoder.advance(tokens).clone() for tokens in appended[1:-1]]
        decoder.keep(torch.tensor([1], device=device))
        step_logits.append(decoder.advance(appended[-1][1:]))
    largest = 0.0
    for row, query in enumerate(queries):
        steps = len(appended) if row == 1 else len(appended) - 1
        response = torch.stack([tokens[row] for tokens in appended[:steps]])
        if model.config.is_encoder_decoder:
            tokens = torch.cat([torch.tensor([start_token(model)], device=device), response])[None]
            plain = model(input_ids=query[None], decoder_input_ids=tokens, use_cache=False).logits[0]
        else:
            plain = model(input_ids=torch.cat([query, response])[None], use_cache=False).logits[0, len(query) - 1 :]
        decoded = torch.stack([logits[row if len(logits) > 1 else 0] for logits in step_logits[: steps + 1]])
        largest = max(largest, logits_error(decoded, plain))
    return largest
