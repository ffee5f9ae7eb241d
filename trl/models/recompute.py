"""How the layers of a transformers model are run in passes without a cache: again in the backward pass, or compiled.

transformers' own activation checkpointing works in training mode alone, in which dropout is on as well; policies are in
evaluation mode unless their user says otherwise. Here the mode is left alone. A layer's `forward` is replaced on the layer
itself, so that names of parameters and entries of state dicts stay as they are. Passes with a cache, which are those of
sampling, run as ever.
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
# Policy and reference, with and without gradients, first and later layers: each needs code of its own.
_VARIANTS = 64


class CompileError(RuntimeError):
    """Why layers are not run compiled."""


@dataclass(slots=True)
class CompiledCode:
    """What torch.compile made of the kinds of layers of a model; switched off for good where it fails."""

    functions: dict[type, Callable[..., Any]] = field(default_factory=dict)
    off: bool = False

    def switch_off(self, reason: object) -> None:
        """Runs layers as they are from now on, and says why, once."""
        if not self.off:
            self.off = True
            logger.warning("compile=True has no effect: %s", " ".join(str(reason).split())[:500])


class LayerForward:
    """Stands in for the `forward` of a layer. A copy of the layer gets a copy of it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.plain = layer.forward
        self.recomputed: Any = None  # the configuration of the decoder, if activations are to be computed again
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
    """`run` with the attention and the context variables of this moment, whenever and in whatever thread it is called.

    Packed attention is chosen for the length of a forward pass; the backward pass comes after it, on a GPU in a thread of
    its own.
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
    """What torch.compile raises where it cannot trace, translate or build; not what a computation raises."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler)


def _layers(model: nn.Module) -> list[Any]:
    return [m for m in base_language_model(model).modules() if isinstance(m, GradientCheckpointingLayer)]


def _stand_in(layer: Any) -> LayerForward:
    """The stand-in of a layer, put there if there is none."""
    found = layer.__dict__.get("forward")
    if not isinstance(found, LayerForward):
        found = LayerForward(layer)
        layer.forward = found
    return found


def recompute_activations(model: nn.Module) -> None:
    """Lets every layer keep its inputs alone, and be run again in the backward pass: activation checkpointing.

    The numbers are the same to the bit; random numbers (dropout) are drawn again as they were.

    Args:
        model: with or without a value head, an adapter, a wrapper.

    Raises:
        ValueError: if transformers does not know how to cut this architecture into such layers.
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
        model: with or without a value head, an adapter, a wrapper.
        code: shared by all models that are switched off together.

    Raises:
        CompileError: if there is nothing that could be compiled, and why; nothing has been changed then.
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
    # Its blocks follow the lengths of a batch, for each of which there would be other code.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    for kind in {type(layer) for layer in layers} - set(code.functions):
        # Under the shell that every such layer of transformers shares: limits on variants count by function.
        forward = inspect.unwrap(kind.forward)
        more: dict[str, Any] = {}
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            more["recompile_limit"] = _VARIANTS
        code.functions[kind] = torch.compile(forward, dynamic=True, **more)
    for layer in layers:
        _stand_in(layer).code = code
