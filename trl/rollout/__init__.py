"""Sampling responses."""

from trl.rollout.generate import generate_responses, stop_tokens, unseen_by_scoring

__all__ = ["generate_responses", "stop_tokens", "unseen_by_scoring"]
