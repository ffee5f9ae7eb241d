"""Input limits of a model: vocabulary size, context length and decoder start token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from trl.models.trunk import base_language_model, is_encoder_decoder


def vocabulary_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Returns the vocabulary sizes of queries and of responses; None if the model does not define one."""
    trunk = base_language_model(model)
    embeddings, head = trunk.get_input_embeddings(), trunk.get_output_embeddings()
    inputs = getattr(embeddings, "num_embeddings", None)
    outputs = head.weight.shape[0] if head is not None and hasattr(head, "weight") else inputs
    return inputs, outputs if is_encoder_decoder(model) or inputs is None else min(inputs, outputs)


def decoder_start(model: nn.Module) -> int | None:
    """Returns the token that starts an encoder-decoder's responses; None if it is not configured."""
    trunk = base_language_model(model)
    for config in (trunk.generation_config, trunk.config):
        token = getattr(config, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    return None


def context_length(model: nn.Module, *, encoder: bool = False) -> int | None:
    """Returns the context length in tokens; None if the configuration sets no limit.

    For LongRoPE this is the original length, up to which the short frequencies apply. A longer sequence switches its
    whole batch to the long frequencies, so a response could be evaluated with other frequencies than it was sampled
    with.

    Args:
        model: a language model, possibly wrapped.
        encoder: return the limit on queries of an encoder-decoder; otherwise the decoder's.
    """
    side = "encoder" if encoder and is_encoder_decoder(model) else "decoder"
    config = base_language_model(model).config.get_text_config(**{side: True})
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", f"max_{side}_position_embeddings")]
    limits += _short_lengths(config)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _short_lengths(config: Any) -> Iterator[Any]:
    rope = getattr(config, "rope_parameters", None) or {}
    # One for all layers, or one per layer type.
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") == "longrope":
            yield parameters.get("original_max_position_embeddings")
