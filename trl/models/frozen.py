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
from trl.models.padding import ignores_padding
from trl.models.trunk import (
    accepts,
    base_language_model,
    decoder_of,
    is_encoder_decoder,
    trial_words,
    unwrap,
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


_CAN_BEGIN_ABOVE: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def frozen_depth(model: nn.Module) -> int:
    """Counts a decoder's leading frozen layers, whose output no update changes; 0 if passes cannot start above them.

    Neither these layers nor anything before them takes a gradient. If the first layer is frozen, runs a forward pass on
    a few tokens to find out; the model must be in evaluation mode.
    """
    whole = getattr(unwrap(model), "pretrained_model", unwrap(model))  # adapters may run something before the layers
    if is_encoder_decoder(model) or not ignores_padding(model):
        return 0
    layers = _layers(base_language_model(model))
    if not layers or any(p.requires_grad for p in layers[0].parameters()):
        return 0
    with torch.enable_grad(), _watched(layers) as seen:
        whole(**_words(whole))
    if len(seen) != len(layers) or not all(isinstance(states, Tensor) for states in seen):
        return 0
    learns = [states.requires_grad for states in seen]
    depth = learns.index(True) if True in learns else len(learns)
    return depth if depth and _can_begin_above(whole, seen[depth - 1], depth) else 0


def shares_frozen(policy: nn.Module, reference: nn.Module, depth: int) -> bool:
    """Whether the reference shares the policy's frozen first `depth` layers and everything that runs before them."""
    mine, theirs = (base_language_model(model) for model in (policy, reference))
    if mine is theirs:  # the reference is the policy with adapters disabled: the shared part must hold none
        upper = {module for layer in _layers(mine)[depth:] for module in layer.modules()}
        return not any(
            type(module).__module__.startswith("peft.") for module in decoder_of(mine).modules() if module not in upper
        )
    above = {id(p) for layer in _layers(mine)[depth:] for p in layer.parameters()}
    other = dict(decoder_of(theirs).named_parameters())
    below = [(name, p) for name, p in decoder_of(mine).named_parameters() if id(p) not in above and not p.requires_grad]
    same = type(mine) is type(theirs) and all(other.get(name) is p for name, p in below)
    return same and mine.get_input_embeddings().weight is theirs.get_input_embeddings().weight


@contextmanager
def only_first_layers(model: nn.Module, depth: int) -> Iterator[list[Any]]:
    """Skips all layers after the first `depth`; yields a list that collects layer `depth`'s outputs `[.., n, H]`."""
    layers = _layers(base_language_model(model))
    skipped = dict.fromkeys(layers[depth:], lambda hidden, *args, **kwargs: hidden)
    with _watched(layers[depth - 1 : depth]) as seen, replaced_forwards(skipped):
        yield seen


@contextmanager
def beginning_above(model: nn.Module, states: Tensor, depth: int) -> Iterator[None]:
    """Skips the first `depth` layers inside the `with` block and uses `states` `[.., n, H]` as their output."""
    layers = _layers(base_language_model(model))[:depth]
    with replaced_forwards(dict.fromkeys(layers, lambda hidden, *args, **kwargs: states)):
        yield


def draws_below(model: nn.Module, depth: int) -> bool:
    """Whether the first `depth` layers, or anything before them, are in training mode and may apply dropout."""
    base = base_language_model(model)
    return decoder_of(base).training or any(layer.training for layer in _layers(base)[:depth])


def _layers(base: Any) -> list[Any]:
    return [module for module in decoder_of(base).modules() if isinstance(module, GradientCheckpointingLayer)]


def _words(model: Any) -> dict[str, Any]:
    return {"input_ids": trial_words(model)[0][None]} | ({"use_cache": False} if accepts(model, "use_cache") else {})


@torch.no_grad()
def _can_begin_above(model: Any, states: Tensor, depth: int) -> bool:
    """Whether the last hidden state is bitwise equal when `states` replace the output of the first `depth` layers."""
    known = _CAN_BEGIN_ABOVE.setdefault(model, {})
    if depth not in known:
        try:
            with without_head(model) as whole:
                model(**_words(model))
            with without_head(model) as upper, beginning_above(model, states, depth):
                model(**_words(model))
            found = whole.value is not None and upper.value is not None and torch.equal(whole.value, upper.value)
            reason = "its last hidden state is another then"
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            found, reason = False, f"{type(error).__name__}: {error}"
        if not found:
            name = type(base_language_model(model)).__name__
            logger.info("%s: frozen first layers are run in every pass: %s", name, reason)
        known[depth] = found
    return known[depth]


@contextmanager
def _watched(layers: list[Any]) -> Iterator[list[Any]]:
    """Yields a list that collects the outputs of `layers`, in execution order."""
    seen: list[Any] = []
    handles = [layer.register_forward_hook(lambda module, args, output: seen.append(output)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
