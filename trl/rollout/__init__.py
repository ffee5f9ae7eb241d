"""Engines that sample responses."""

from trl.rollout.engine import Sampled, Sampling, obstacle, sample
from trl.rollout.generate import (
    generate_responses,
    own_sampling,
    sample_responses,
    stop_tokens,
    unseen_by_scoring,
    with_prompts,
)

__all__ = [
    "Sampled",
    "Sampling",
    "generate_responses",
    "obstacle",
    "own_sampling",
    "sample",
    "sample_responses",
    "stop_tokens",
    "unseen_by_scoring",
    "with_prompts",
]
