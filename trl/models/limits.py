"""What a model can take: how many token ids, how many positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from trl.models.trunk import base_language_model, is_encoder_decoder


def vocabulary_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """How many token ids the model reads in a query, and how many it knows in a response; None where it does not say."""
    trunk = base_language_model(model)
    reads, writes = trunk.get_input_embeddings(), trunk.get_output_embeddings()
    read = getattr(reads, "num_embeddings", None)
    written = writes.weight.shape[0] if writes is not None and hasattr(writes, "weight") else read
    return read, written if is_encoder_decoder(model) or read is None else min(read, written)


def decoder_start(model: nn.Module) -> int | None:
    """The token that an encoder-decoder's responses begin with; None where it does not say."""
    trunk = base_language_model(model)
    for config in (trunk.generation_config, trunk.config):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    return None


def context_length(model: nn.Module, *, encoder: bool = False) -> int | None:
    """Tokens the model can look at; None where its configuration sets no limit.

    Under LongRoPE it is the length up to which short frequencies are used: beyond it every sequence of a batch would get the
    long ones, and a response those after it was sampled that it was not sampled with.

    Args:
        model: a language model under any wrappers.
        encoder: those of a query, where the model is an encoder-decoder; else those of the decoder.
    """
    side = "encoder" if encoder and is_encoder_decoder(model) else "decoder"
    config = base_language_model(model).config.get_text_config(**{side: True})
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", f"max_{side}_position_embeddings")]
    limits += _short_lengths(config)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _short_lengths(config: Any) -> Iterator[Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (
        rope,
        *(value for value in rope.values() if isinstance(value, dict)),
    ):  # of all layers, or of each kind
        if kind.get("rope_type") == "longrope":
            yield kind.get("original_max_position_embeddings")
