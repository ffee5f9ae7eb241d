"""Computes the output of a decoder's frozen first layers once per rollout, for policy, reference and every epoch.

With `create_reference_model(model, num_shared_layers=n)`, or an adapter on the upper layers only, updates never change
the output of the first layers. If a trial run confirms this, forward passes start above them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from trl.kernels.door import replaced_forwards
from trl.models.padding import ignores_padding, unpadded_inputs
from trl.models.trunk import (
    base_language_model,
    decoder_of,
    is_encoder_decoder,
    pretrained_part,
    probe_sequences,
    without_head,
)
from trl.types import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutAboveFrozen(Rollout):
    """A rollout with the cached output of the policy's frozen first layers."""

    states: Tensor  # [B, T, H] output of the first `depth` layers
    depth: int

    @classmethod
    def of(cls, rollout: Rollout, states: Tensor, depth: int) -> RolloutAboveFrozen:
        """Adds `states` [B, T, H] of the first `depth` layers to `rollout`."""
        return cls(**{f.name: getattr(rollout, f.name) for f in fields(Rollout)}, states=states, depth=depth)

    def without_states(self) -> Rollout:
        """Returns the plain rollout, as the engine returned it."""
        return Rollout(**{f.name: getattr(self, f.name) for f in fields(Rollout)})


_CAN_SKIP: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def frozen_depth(model: nn.Module) -> int:
    """Counts a decoder's leading frozen layers, whose output no update changes; 0 if passes cannot start above them.

    Neither these layers nor anything before them takes a gradient. If the first layer is frozen, runs a forward pass on
    a few tokens to find out; the model must be in evaluation mode.
    """
    pretrained = pretrained_part(model)  # adapters may run something before the layers
    if is_encoder_decoder(model) or not ignores_padding(model):
        return 0
    layers = _layers(base_language_model(model))
    if not layers or any(p.requires_grad for p in layers[0].parameters()):
        return 0
    with torch.enable_grad(), _watched(layers) as outputs:
        pretrained(**unpadded_inputs(pretrained, probe_sequences(pretrained)[0]))
    if len(outputs) != len(layers) or not all(isinstance(states, Tensor) for states in outputs):
        return 0
    needs_grad = [states.requires_grad for states in outputs]
    depth = needs_grad.index(True) if True in needs_grad else len(needs_grad)
    return depth if depth and _can_skip_layers(pretrained, outputs[depth - 1], depth) else 0


def shares_frozen(policy: nn.Module, reference: nn.Module, depth: int) -> bool:
    """Whether the reference shares the policy's frozen first `depth` layers and everything that runs before them."""
    base, reference_base = (base_language_model(model) for model in (policy, reference))
    if base is reference_base:  # it is the policy with adapters disabled
        upper = {module for layer in _layers(base)[depth:] for module in layer.modules()}
        return not any(
            type(module).__module__.startswith("peft.") for module in decoder_of(base).modules() if module not in upper
        )
    above = {id(p) for layer in _layers(base)[depth:] for p in layer.parameters()}
    reference_parameters = dict(decoder_of(reference_base).named_parameters())
    below = [(name, p) for name, p in decoder_of(base).named_parameters() if id(p) not in above and not p.requires_grad]
    shared = type(base) is type(reference_base) and all(reference_parameters.get(name) is p for name, p in below)
    return shared and base.get_input_embeddings().weight is reference_base.get_input_embeddings().weight


@contextmanager
def only_first_layers(model: nn.Module, depth: int) -> Iterator[list[Any]]:
    """Skips all layers after the first `depth`; yields a list that collects layer `depth`'s outputs `[.., n, H]`."""
    layers = _layers(base_language_model(model))
    skipped = dict.fromkeys(layers[depth:], lambda hidden, *args, **kwargs: hidden)
    with _watched(layers[depth - 1 : depth]) as outputs, replaced_forwards(skipped):
        yield outputs


@contextmanager
def skipping_first_layers(model: nn.Module, states: Tensor, depth: int) -> Iterator[None]:
    """Skips the first `depth` layers inside the `with` block and uses `states` `[.., n, H]` as their output."""
    layers = _layers(base_language_model(model))[:depth]
    with replaced_forwards(dict.fromkeys(layers, lambda hidden, *args, **kwargs: states)):
        yield


def first_layers_in_training(model: nn.Module, depth: int) -> bool:
    """Whether the first `depth` layers, or anything before them, are in training mode and may apply dropout."""
    base = base_language_model(model)
    return decoder_of(base).training or any(layer.training for layer in _layers(base)[:depth])


def _layers(base: Any) -> list[Any]:
    return [module for module in decoder_of(base).modules() if isinstance(module, GradientCheckpointingLayer)]


@torch.no_grad()
def _can_skip_layers(model: Any, states: Tensor, depth: int) -> bool:
    """Whether the last hidden state is bitwise equal when `states` replace the output of the first `depth` layers."""
    results = _CAN_SKIP.setdefault(model, {})
    if depth not in results:
        inputs = unpadded_inputs(model, probe_sequences(model)[0])
        try:
            with without_head(model) as complete:
                model(**inputs)
            with without_head(model) as above, skipping_first_layers(model, states, depth):
                model(**inputs)
            equal = complete.value is not None and above.value is not None and torch.equal(complete.value, above.value)
            reason = "skipping them changes its last hidden state"
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            equal, reason = False, f"{type(error).__name__}: {error}"
        if not equal:
            name = type(base_language_model(model)).__name__
            logger.info("%s: every pass runs the frozen first layers: %s", name, reason)
        results[depth] = equal
    return results[depth]


@contextmanager
def _watched(layers: list[Any]) -> Iterator[list[Any]]:
    """Yields a list that collects the outputs of `layers`, in execution order."""
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
