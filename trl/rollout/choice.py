"""Chooses the engine of a sampling call: our own decoding loop, or transformers' `generate` where it does not apply."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from trl.protocols import RolloutEngine
from trl.rollout.generation_settings import local_sampling
from trl.rollout.hf import TransformersEngine
from trl.rollout.local import Critic, LocalEngine
from trl.rollout.self_check import fixed_steps_obstacle, obstacle
from trl.types import Sampling

# Result of `obstacle` for each model, which runs once.
_SELF_CHECKS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
# Whether each model on a GPU decodes in steps of fixed shapes.
_FIXED_STEPS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An engine and its request, whose seed is not set yet."""

    engine: RolloutEngine
    request: Sampling
    reason: str | None  # why transformers' generate samples; None for our own loop


def choose_engine(
    model: Any,
    kwargs: dict[str, Any],
    limits: Sequence[int] | None,
    *,
    tokenizer: Any,
    pad_token: int,
    batch_size: int,
    limits_are_drawn: bool,
    critic: Critic = nullcontext,
) -> Choice:
    """Chooses an engine for one sampling call.

    Args:
        model: a language model, possibly with adapters and a value head, in evaluation mode.
        kwargs: arguments of transformers' `generate`.
        limits: maximum new tokens of each response; None leaves them to `generate`.
        tokenizer: finds stop strings.
        pad_token: pads queries and the rollout's tokens.
        batch_size: queries sampled together.
        limits_are_drawn: whether a length sampler drew the limits, which then override `kwargs`.
        critic: watches the critic's values in our own loop, unless it samples greedily.
    """
    bare = getattr(model, "pretrained_model", model)
    problem = known_obstacle(bare)
    placeholder: Mapping[str, Any] = {"max_new_tokens": 1} if limits_are_drawn else {}  # `limits` replaces it
    request = local_sampling(model.generation_config, {**kwargs, **placeholder})
    reason = problem or (request if isinstance(request, str) else None)
    if isinstance(request, Sampling) and limits is not None and reason is None:
        critic = nullcontext if request.greedy else critic
        engine = LocalEngine(
            bare, pad_token=pad_token, batch_size=batch_size, critic=critic, fixed_steps=_takes_fixed_steps(bare)
        )
        return Choice(engine=engine, request=replace(request, limits=tuple(limits)), reason=None)
    return Choice(
        engine=TransformersEngine(
            model,
            tokenizer=tokenizer,
            pad_token=pad_token,
            batch_size=batch_size,
            pads=problem is None,
            arguments=kwargs,
        ),
        request=Sampling(limits=tuple(limits or ()) if limits_are_drawn else ()),
        reason=reason or "max_new_tokens is not set",
    )


def known_obstacle(model: nn.Module) -> str | None:
    """Why our own loop cannot decode a plain model in evaluation mode, or None; each model is checked once."""
    if model not in _SELF_CHECKS:
        _SELF_CHECKS[model] = obstacle(model)
    return _SELF_CHECKS[model]


def _takes_fixed_steps(model: nn.Module) -> bool:
    """Whether a model is on a GPU and decodes there in steps of fixed shapes; each model is tried once."""
    if next(model.parameters()).device.type != "cuda":
        return False
    if model not in _FIXED_STEPS:
        problem = fixed_steps_obstacle(model)
        _FIXED_STEPS[model] = problem is None
        if problem is not None:
            logger.info("sampling without CUDA graphs: %s", problem)
    return _FIXED_STEPS[model]
