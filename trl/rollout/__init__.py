"""Sampling responses from a policy: the engines, and what a `generate` call may ask of them."""

from trl.rollout.assembly import rollout_rows
from trl.rollout.generation_settings import (
    check_context,
    check_sampling,
    new_token_limits,
    own_sampling,
    stop_strings,
    stop_tokens,
    unseen_by_scoring,
)
from trl.rollout.hf import TransformersEngine
from trl.rollout.local import LocalEngine, Sampled, sample
from trl.rollout.self_check import obstacle

__all__ = [
    "LocalEngine",
    "Sampled",
    "TransformersEngine",
    "check_context",
    "check_sampling",
    "new_token_limits",
    "obstacle",
    "own_sampling",
    "rollout_rows",
    "sample",
    "stop_strings",
    "stop_tokens",
    "unseen_by_scoring",
]
