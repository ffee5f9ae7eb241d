"""The parts of `PPOConfig` that PPO's loss and rewards read."""

from __future__ import annotations

from collections.abc import Sequence

from trl.algorithms.ppo import PPOSettings, RewardSettings
from trl.trainer.ppo_config import PPOConfig
from trl.training.scores import ScoreSettings
from trl.types import Moments


def ppo_settings(config: PPOConfig) -> PPOSettings:
    """Settings of the loss."""
    return PPOSettings(
        clip_range=float(config.cliprange or 0),
        value_clip_range=float(config.cliprange_value or 0),
        value_coef=float(config.vf_coef or 0),
        dual_clip=config.dual_clip,
        importance_cap=config.importance_cap,
        temperature=config.temperature,
    )


def reward_settings(config: PPOConfig, moments: Moments, stops: Sequence[int]) -> RewardSettings:
    """Settings of rewards and advantages, with the scores' running moments and the tokens that end a response."""
    return RewardSettings(
        gamma=float(config.gamma or 0),
        lam=float(config.lam or 0),
        whiten=config.whiten_rewards,
        scores=ScoreSettings(
            missing_eos_penalty=config.missing_eos_penalty,
            scale=config.use_score_scaling,
            center=config.use_score_norm,
            clip=config.score_clip,
        ),
        moments=moments,
        stops=stops,
    )
