"""The public face: configurations and trainers."""

from trl.trainer.base import BaseTrainer
from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_trainer import PPOTrainer

__all__ = ["AdaptiveKLController", "BaseTrainer", "FixedKLController", "PPOConfig", "PPOTrainer"]
