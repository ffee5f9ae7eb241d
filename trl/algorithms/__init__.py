"""Algorithms: PPO, and critic-free policy gradients such as GRPO."""

from trl.algorithms.grpo import grpo
from trl.algorithms.policy_gradient import KLPenalty, PolicyGradient, policy_gradient
from trl.algorithms.ppo import PPO, PPOSettings

__all__ = ["PPO", "KLPenalty", "PPOSettings", "PolicyGradient", "grpo", "policy_gradient"]
