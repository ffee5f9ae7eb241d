"""Where scores come from: anything that maps prompts and completions to one number each."""

from trl.rewards.classifier import ClassifierReward

__all__ = ["ClassifierReward"]
