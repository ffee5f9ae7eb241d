"""Activation checkpointing for the layers of a transformers model, in passes without a cache.

transformers' own activation checkpointing works only in training mode, which also turns dropout on; policies are in
evaluation mode by default. This one works in either mode. Passes with a cache, as in sampling, are unaffected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from trl.kernels.door import chosen_attention, replace_forwards
from trl.models.predictions import decoder_config
from trl.models.trunk import base_language_model

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


class LayerForward:
    """Replacement for a layer's `forward`; copied along with the layer.

    Args:
        layer: a decoder or encoder layer.
        config: the configuration that names the attention implementation of the layer.
    """

    def __init__(self, layer: nn.Module, config: Any) -> None:
        self.plain = layer.forward
        self.config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _has_cache(args, kwargs) or not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        return checkpoint(_bind_context(self.plain, self.config), *args, use_reentrant=False, **kwargs)


def _bind_context(run: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """Binds `run` to the current attention implementation and context variables, for any later call in any thread.

    Packed attention is active only during the forward pass; recomputation happens in the backward pass, which on a GPU
    runs in another thread.
    """
    context, attention = copy_context(), config._attn_implementation

    def bound(*args: Any, **kwargs: Any) -> Any:
        with chosen_attention(config, attention):
            return context.run(run, *args, **kwargs)

    return bound


def _has_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Cache) for x in (*args, *kwargs.values())) or any(
        kwargs.get(name) is not None for name in _CACHES
    )


def recompute_activations(model: nn.Module) -> None:
    """Turns on activation checkpointing: every layer keeps only its inputs and is recomputed in the backward pass.

    Results are bitwise identical; dropout masks are reproduced. It lasts as long as the model: a caller's own passes
    are checkpointed, too.

    Args:
        model: with or without a value head, adapter or wrapper.

    Raises:
        ValueError: if transformers does not support activation checkpointing for this architecture.
    """
    base = base_language_model(model)
    layers: list[Any] = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not base.supports_gradient_checkpointing or not layers:
        raise ValueError(
            f"gradient_checkpointing=True: {type(base).__name__} does not support activation checkpointing "
            f"(supports_gradient_checkpointing={base.supports_gradient_checkpointing}, {len(layers)} checkpointable "
            "layers)"
        )
    config = decoder_config(model)
    # Layers that an earlier trainer replaced are skipped: wrapped twice, each would run three times.
    plain = [layer for layer in layers if not isinstance(vars(layer).get("forward"), LayerForward)]
    replace_forwards({layer: LayerForward(layer, config) for layer in plain})
