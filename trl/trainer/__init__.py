"""The public face: configurations and trainers."""

from trl.trainer.base import BaseTrainer
from trl.trainer.callbacks import TrainCallback
from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.train_options import TrainResult

__all__ = [
    "AdaptiveKLController",
    "BaseTrainer",
    "FixedKLController",
    "PPOConfig",
    "PPOTrainer",
    "TrainCallback",
    "TrainResult",
]
