"""Sampling responses from a policy: rollout engines, and the arguments of a `generate` call."""

from trl.rollout.assembly import rollout_rows, same_queries
from trl.rollout.choice import Choice, choose_engine, known_obstacle
from trl.rollout.generation_settings import (
    check_context,
    check_sampling,
    local_sampling,
    new_token_limits,
    stop_strings,
    stop_tokens,
    unseen_by_scoring,
)
from trl.rollout.hf import TransformersEngine
from trl.rollout.local import LocalEngine, Sampled, sample
from trl.rollout.replay import replayed_logprobs
from trl.rollout.self_check import obstacle

__all__ = [
    "Choice",
    "LocalEngine",
    "Sampled",
    "TransformersEngine",
    "check_context",
    "check_sampling",
    "choose_engine",
    "known_obstacle",
    "local_sampling",
    "new_token_limits",
    "obstacle",
    "replayed_logprobs",
    "rollout_rows",
    "same_queries",
    "sample",
    "stop_strings",
    "stop_tokens",
    "unseen_by_scoring",
]
