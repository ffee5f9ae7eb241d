"""Forward inputs, and run-time checks that a model's logits do not depend on padding or on later tokens.

Each model is probed once, on a few tokens, instead of being looked up in a list.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl.functional.probes import logits_error, logits_tolerance
from trl.models.trunk import (
    accepts,
    base_language_model,
    evaluation_mode,
    is_encoder_decoder,
    pretrained_part,
    probe_sequences,
)
from trl.types import Rollout, occupied, take

logger = logging.getLogger(__name__)

_PROBES: WeakKeyDictionary[nn.Module, _Probe] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Probe:
    lookahead: str | None  # how logits depend on later tokens; None if they do not
    padding: str | None  # how logits depend on padding; None if they do not


def ignores_padding(model: nn.Module) -> bool:
    """Whether sequences of different lengths can share a right-padded pass; if not, a pass takes one length only.

    Raises:
        ValueError: for a decoder whose logits depend on later tokens: its log-probabilities of a finished response
            differ from those it was sampled with.
    """
    base = base_language_model(model)
    if base not in _PROBES:
        name = type(base).__name__
        probe = _probe(pretrained_part(model))
        if probe.lookahead is not None:
            problem = (
                f"{name}: logits depend on later tokens ({probe.lookahead}), so log-probabilities of a finished "
                "response differ from those it was sampled with"
            )
            if not is_encoder_decoder(model):
                hint = ": load it with is_decoder=True" if getattr(base.config, "is_decoder", None) is False else ""
                raise ValueError(f"{problem}{hint}. See docs/doctor.md#not-causal")
            logger.warning("%s", problem)
        if probe.padding is not None:
            logger.info("%s: only sequences of equal length share a pass: %s", name, probe.padding)
        _PROBES[base] = probe
    return _PROBES[base].padding is None


@torch.no_grad()
def _probe(model: Any) -> _Probe:
    sequences = probe_sequences(model)
    with evaluation_mode(model), torch.autocast(sequences[0].device.type, enabled=False):
        if (change := _position_effect(model, sequences[0])) is not None:
            logger.warning(
                "%s: positions are counted from 0 here and in generate, but differently in a forward pass without "
                "position_ids, whose logits differ by %s",
                type(model).__name__,
                change,
            )
        return _Probe(lookahead=_lookahead(model, torch.cat(sequences)), padding=_padding_effect(model, sequences))


def _position_effect(model: Any, tokens: Tensor) -> str | None:
    """Describes how explicit positions change the logits, as in the RoBERTa family; None if they do not."""
    if not accepts(model, "position_ids") or is_encoder_decoder(model):
        return None
    inputs = forward_inputs(model, tokens[None], torch.ones_like(tokens[None]).bool())
    with_positions = model(**inputs).logits[0]
    del inputs["position_ids"]
    return _difference(model, with_positions, model(**inputs).logits[0])


def _lookahead(model: Any, tokens: Tensor) -> str | None:
    """Describes how changing later tokens changes the logits; None if it does not."""
    half = len(tokens) // 2
    variants = [torch.cat([tokens[:half], tokens[half:].flip(0)])]
    if is_encoder_decoder(model):  # ProphetNet's logits depend on the number of tokens
        variants.append(tokens[:half])
    expected = _logits(model, tokens[None], tokens[None])[0, :half]
    for variant in variants:
        if change := _difference(model, _logits(model, variant[None], tokens[None])[0, :half], expected):
            return f"they change by {change}"
    return None


def _padding_effect(model: Any, sequences: list[Tensor]) -> str | None:
    """Describes how padding changes the logits; None if it does not."""
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    attention = nn.utils.rnn.pad_sequence([torch.ones_like(tokens).bool() for tokens in sequences], batch_first=True)
    encoder = (tokens, attention) if is_encoder_decoder(model) else (None, None)
    try:
        padded = model(**forward_inputs(model, tokens, attention, *encoder)).logits
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        return f"padding fails with {type(error).__name__}: {error}"
    for sequence, logits in zip(sequences, padded, strict=True):
        alone = _logits(model, sequence[None], sequence[None])[0]
        if change := _difference(model, logits[: len(sequence)], alone):
            return f"padding changes the logits by {change}"
    return None


def _logits(model: Any, tokens: Tensor, query: Tensor) -> Tensor:
    """Returns logits `[b, t, V]` of unpadded `tokens`; an encoder, if there is one, reads `query`."""
    encoder = (query, torch.ones_like(query).bool()) if is_encoder_decoder(model) else (None, None)
    return model(**forward_inputs(model, tokens, torch.ones_like(tokens).bool(), *encoder)).logits


def _difference(model: Any, logits: Tensor, expected: Tensor) -> str | None:
    """Describes a difference that rounding does not explain; None if there is no such difference."""
    error = logits_error(logits, expected)
    within_tolerance = error <= logits_tolerance(model.get_input_embeddings().weight)
    return None if within_tolerance else f"{error:.1e} standard deviations"


def unpadded_inputs(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Builds cache-free forward keyword arguments for one sequence `[T]`, which an encoder-decoder also encodes."""
    inputs: dict[str, Any] = {"input_ids": tokens[None]} | ({"use_cache": False} if accepts(model, "use_cache") else {})
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = tokens[None]
    return inputs


def forward_inputs(
    model: nn.Module,
    tokens: Tensor,
    attention: Tensor,
    encoder_tokens: Tensor | None = None,
    encoder_attention: Tensor | None = None,
) -> dict[str, Any]:
    """Builds cache-free forward keyword arguments for tokens `[B, T]`; an encoder-decoder needs `encoder_*` as well."""
    inputs: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    if encoder_tokens is None or encoder_attention is None:
        inputs |= {"input_ids": tokens, "attention_mask": attention.long()}
        if accepts(model, "position_ids"):
            inputs["position_ids"] = (attention.long().cumsum(dim=1) - 1).clamp(min=0)
        return inputs
    order = left_aligning_order(encoder_attention)
    return inputs | {
        "input_ids": reorder(clean(encoder_tokens, encoder_attention), order),
        "attention_mask": reorder(encoder_attention.long(), order),
        "decoder_input_ids": tokens,
        "decoder_attention_mask": attention.long(),
    }


def clean(tokens: Tensor, attention: Tensor) -> Tensor:
    """Replaces padding by token 0, because it may be anything, even ids outside the vocabulary."""
    return tokens.masked_fill(~attention.bool(), 0)


def left_aligning_order(attention: Tensor) -> Tensor:
    """Returns a column order [B, T] that puts each row's tokens before its padding, given `attention` [B, T]."""
    return torch.argsort(~attention.bool(), dim=1, stable=True)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Reorders the columns of `x` [B, T, ...] by `order` [B, T]."""
    return x.gather(1, order.reshape(order.shape + (1,) * (x.dim() - 2)).expand_as(x))


def padding_mask(rollout: Rollout) -> Tensor:
    """Returns the padding mask: `[B, T]`, or `[B, T + encoder length]` for an encoder-decoder."""
    both = [rollout.attention] if rollout.encoder_attention is None else [rollout.attention, rollout.encoder_attention]
    return ~torch.cat(both, dim=1).bool()


def _rows_by_padding(rollout: Rollout) -> list[Tensor]:
    """Groups sequences by padding pattern; returns each group's row indices `[b]`."""
    _, kinds = padding_mask(rollout).unique(dim=0, return_inverse=True)
    return [(kinds == kind).nonzero().squeeze(1) for kind in range(int(kinds.max()) + 1)]


def split_by_padding(rollout: Rollout) -> list[Rollout]:
    """Splits a rollout into parts whose sequences have the same padding, and trims it."""
    return [take(rollout, rows, occupied(rollout.attention[rows])) for rows in _rows_by_padding(rollout)]


def join_parts(rollout: Rollout, parts: list[Tensor | None]) -> Tensor | None:
    """Reassembles results for the parts of `split_by_padding` into `[B, S, ...]`, 0 elsewhere."""
    whole: Tensor | None = None
    for rows, part in zip(_rows_by_padding(rollout), parts, strict=True):
        if part is None:
            return None
        columns = occupied(rollout.attention[rows])
        wide = F.pad(part, (*(0, 0) * (part.dim() - 2), columns.start, rollout.tokens.shape[1] - columns.stop))
        whole = wide.new_zeros(len(rollout), *wide.shape[1:]) if whole is None else whole
        whole = whole.index_copy(0, rows, wide)
    return whole
