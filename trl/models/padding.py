"""Forward inputs, and run-time checks that a model's logits do not depend on padding or on later tokens.

Each model is probed once, on a few tokens, instead of being looked up in a list.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trl.models.trunk import accepts, base_language_model, is_encoder_decoder, trial_words, unwrap

logger = logging.getLogger(__name__)

# Tolerance of the probes: RMS error over the logits' standard deviation, by bytes per weight.
_TOLERANCE = {8: 1e-3, 4: 1e-3, 2: 0.5}  # bfloat16 alone moves logits by 0.25 relative to float32
_FOUND: WeakKeyDictionary[nn.Module, _Trial] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Trial:
    ahead: str | None  # how logits depend on later tokens; None if they do not
    padded: str | None  # how logits depend on padding; None if they do not


def ignores_padding(model: nn.Module) -> bool:
    """Whether sequences of different lengths can share a right-padded pass; if not, a pass takes one length only.

    Raises:
        ValueError: for a decoder whose logits depend on later tokens: its log-probabilities of a finished response are
            not those the response was sampled from.
    """
    base = base_language_model(model)
    if base not in _FOUND:
        name = type(base).__name__
        found = _tried(getattr(unwrap(model), "pretrained_model", unwrap(model)))
        if found.ahead is not None:
            problem = (
                f"{name}: logits depend on the tokens after theirs ({found.ahead}), so that log-probabilities of a finished "
                "response are not those that it is sampled from"
            )
            if not is_encoder_decoder(model):
                hint = ": load it with is_decoder=True" if getattr(base.config, "is_decoder", None) is False else ""
                raise ValueError(problem + hint)
            logger.warning("%s", problem)
        if found.padded is not None:
            logger.info("%s: sequences of one length are read at a time: %s", name, found.padded)
        _FOUND[base] = found
    return _FOUND[base].padded is None


@torch.no_grad()
def _tried(model: Any) -> _Trial:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = model.get_input_embeddings().weight.device
    try:
        with torch.autocast(device.type, enabled=False):
            words = trial_words(model)
            if (gap := _counts_from_elsewhere(model, words[0])) is not None:
                logger.warning(
                    "%s: positions are counted from 0, here and by generate; a pass without position_ids counts them in another "
                    "way, and logits are %s",
                    type(model).__name__,
                    gap,
                )
            return _Trial(ahead=_looks_ahead(model, torch.cat(words)), padded=_sees_padding(model, words))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _counts_from_elsewhere(model: Any, words: Tensor) -> str | None:
    """Describes how explicit positions change the logits, as in the RoBERTa family; None if they do not."""
    if not accepts(model, "position_ids") or is_encoder_decoder(model):
        return None
    inputs = forward_inputs(model, words[None], torch.ones_like(words[None]).bool())
    counted = model(**inputs).logits[0]
    del inputs["position_ids"]
    return _gap(model, counted, model(**inputs).logits[0], "off")


def _looks_ahead(model: Any, words: Tensor) -> str | None:
    half = len(words) // 2
    others = [torch.cat([words[:half], words[half:].flip(0)])]
    if is_encoder_decoder(model):  # ProphetNet's logits depend on the number of tokens
        others.append(words[:half])
    plain = _logits(model, words[None], words[None])[0, :half]
    for other in others:
        if reason := _gap(model, _logits(model, other[None], words[None])[0, :half], plain, "off"):
            return reason
    return None


def _sees_padding(model: Any, words: list[Tensor]) -> str | None:
    tokens = nn.utils.rnn.pad_sequence(words, batch_first=True)
    attention = nn.utils.rnn.pad_sequence([torch.ones_like(some).bool() for some in words], batch_first=True)
    encoder = (tokens, attention) if is_encoder_decoder(model) else (None, None)
    try:
        together = model(**forward_inputs(model, tokens, attention, *encoder)).logits
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        return f"with padding, {type(error).__name__}: {error}"
    for row, some in enumerate(words):
        alone = _logits(model, some[None], some[None])[0]
        if reason := _gap(model, together[row, : len(some)], alone, "with padding, logits are off"):
            return reason
    return None


def _logits(model: Any, tokens: Tensor, query: Tensor) -> Tensor:
    """Returns logits `[b, t, V]` of unpadded `tokens`; an encoder, if there is one, reads `query`."""
    encoder = (query, torch.ones_like(query).bool()) if is_encoder_decoder(model) else (None, None)
    return model(**forward_inputs(model, tokens, torch.ones_like(tokens).bool(), *encoder)).logits


def _gap(model: Any, seen: Tensor, expected: Tensor, what: str) -> str | None:
    gap = ((seen.float() - expected.float()).square().mean(dim=-1).sqrt() / expected.float().std(dim=-1)).max().item()
    if gap <= _TOLERANCE.get(model.get_input_embeddings().weight.element_size(), 0.5):
        return None
    return f"{what} by {gap:.1e} standard deviations"


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
    order = left_edge(encoder_attention)
    return inputs | {
        "input_ids": move(clean(encoder_tokens, encoder_attention), order),
        "attention_mask": move(encoder_attention.long(), order),
        "decoder_input_ids": tokens,
        "decoder_attention_mask": attention.long(),
    }


def clean(tokens: Tensor, attention: Tensor) -> Tensor:
    """Replaces padding by token 0: it may hold anything, even ids outside the vocabulary."""
    return tokens.masked_fill(~attention.bool(), 0)


def left_edge(attention: Tensor) -> Tensor:
    """Returns a column order [B, T] that puts each row's tokens before its padding, given `attention` [B, T]."""
    return torch.argsort(~attention.bool(), dim=1, stable=True)


def move(x: Tensor, order: Tensor) -> Tensor:
    """Reorders the columns of `x` [B, T, ...] by `order` [B, T]."""
    return x.gather(1, order.reshape(order.shape + (1,) * (x.dim() - 2)).expand_as(x))
