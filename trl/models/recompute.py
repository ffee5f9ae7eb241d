"""Activation checkpointing and torch.compile for the layers of a transformers model, in passes without a cache.

transformers' own activation checkpointing works only in training mode, which also turns dropout on; policies are in
evaluation mode by default. This one works in either mode. It replaces each layer's `forward` on the instance, so
parameter names and state dict keys do not change. Passes with a cache, as in sampling, are unaffected.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from trl.kernels.packed_attention import NAME, packed_attention
from trl.models.predictions import decoder_config
from trl.models.trunk import base_language_model

logger = logging.getLogger(__name__)

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")
# Recompile limit: policy and reference, with and without gradients, first and later layers each need their own code.
_VARIANTS = 64


class CompileError(RuntimeError):
    """Layers cannot be compiled; the message says why."""


@dataclass(slots=True)
class CompiledCode:
    """Compiled forward functions by layer class; switched off permanently once compilation fails."""

    functions: dict[type, Callable[..., Any]] = field(default_factory=dict)
    off: bool = False

    def switch_off(self, reason: object) -> None:
        """Runs layers uncompiled from here on, and logs the reason once."""
        if not self.off:
            self.off = True
            logger.warning("compile=True has no effect: %s", " ".join(str(reason).split())[:500])


class LayerForward:
    """Replacement for a layer's `forward`; copied along with the layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.plain = layer.forward
        self.recomputed: Any = None  # the decoder's configuration if activations are recomputed, else None
        self.code: CompiledCode | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _has_cache(args, kwargs):
            return self.plain(*args, **kwargs)
        if self.recomputed is not None and torch.is_grad_enabled():
            return checkpoint(_as_now(self._run, self.recomputed), *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.code is None or self.code.off:
            return self.plain(*args, **kwargs)
        try:
            return self.code.functions[type(self.layer)](self.layer, *args, **kwargs)
        except compile_errors() as error:
            self.code.switch_off(f"{type(error).__name__}: {error}")
            return self.plain(*args, **kwargs)


def _as_now(run: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """Binds `run` to the current attention implementation and context variables, for any later call in any thread.

    Packed attention is active only during the forward pass; recomputation happens in the backward pass, which on a GPU
    runs in another thread.
    """
    context, attention = copy_context(), config._attn_implementation

    def later(*args: Any, **kwargs: Any) -> Any:
        before = config._attn_implementation
        config._attn_implementation = attention
        try:
            return context.run(run, *args, **kwargs)
        finally:
            config._attn_implementation = before

    return later


def _has_cache(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Cache) for x in (*args, *kwargs.values())) or any(
        kwargs.get(name) is not None for name in _CACHES
    )


def compile_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of torch.compile failing to trace, lower or build; not those of the computation."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler)


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in base_language_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]


def _stand_in(layer: Any) -> LayerForward:
    """Returns the layer's `LayerForward`, installing one if needed."""
    found = layer.__dict__.get("forward")
    if not isinstance(found, LayerForward):
        found = LayerForward(layer)
        layer.forward = found
    return found


def recompute_activations(model: nn.Module) -> None:
    """Turns on activation checkpointing: every layer keeps only its inputs and is recomputed in the backward pass.

    Results are bitwise identical; dropout masks are reproduced.

    Args:
        model: with or without a value head, adapter or wrapper.

    Raises:
        ValueError: if transformers does not support activation checkpointing for this architecture.
    """
    base, layers = base_language_model(model), _layers(model)
    if not base.supports_gradient_checkpointing or not layers:
        raise ValueError(
            f"gradient_checkpointing=True: {type(base).__name__} does not support activation checkpointing "
            f"(supports_gradient_checkpointing={base.supports_gradient_checkpointing}, {len(layers)} layers that can be "
            "run again)"
        )
    for layer in layers:
        _stand_in(layer).recomputed = decoder_config(model)


def compiled_layers(model: nn.Module, code: CompiledCode) -> None:
    """Runs every layer through torch.compile.

    Args:
        model: with or without a value head, adapter or wrapper.
        code: shared by all models that fall back to uncompiled layers together.

    Raises:
        CompileError: if the layers cannot be compiled; the model is unchanged then.
    """
    layers = _layers(model)
    if not layers:
        raise CompileError(f"{type(base_language_model(model)).__name__} is not made of layers that could be compiled")
    if any(layer.gradient_checkpointing for layer in layers):
        raise CompileError(
            "transformers' own activation checkpointing is on: ask for PPOConfig.gradient_checkpointing in its place"
        )
    if any(not isinstance(layer.__dict__.get("forward", layer), (nn.Module, LayerForward)) for layer in layers):
        raise CompileError("the layers' forward functions were replaced, as accelerate does under a device_map")
    # Packed attention's blocks depend on the batch's sequence lengths; each combination would compile new code.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for kind in {type(layer) for layer in layers} - set(code.functions):
        # Unwrap the decorator shared by transformers layers: recompile limits are counted per function.
        forward = inspect.unwrap(kind.forward)
        more: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            more["recompile_limit"] = _VARIANTS
        code.functions[kind] = torch.compile(forward, dynamic=True, **more)
    for layer in layers:
        _stand_in(layer).code = code
