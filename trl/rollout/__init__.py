"""Sampling responses from a policy."""

from trl.rollout.engine import Sampled, Sampling, obstacle, sample
from trl.rollout.generate import (
    check_context,
    check_sampling,
    generate_responses,
    new_token_limits,
    own_sampling,
    sample_responses,
    stop_strings,
    stop_tokens,
    unseen_by_scoring,
    with_prompts,
)

__all__ = [
    "Sampled",
    "Sampling",
    "check_context",
    "check_sampling",
    "generate_responses",
    "new_token_limits",
    "obstacle",
    "own_sampling",
    "sample",
    "sample_responses",
    "stop_strings",
    "stop_tokens",
    "unseen_by_scoring",
    "with_prompts",
]
