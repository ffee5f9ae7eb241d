"""Public trainers and their configurations."""

from trl.runs.callbacks import TrainCallback
from trl.runs.options import TrainResult
from trl.trainer.base import BaseTrainer
from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController
from trl.trainer.online import OnlineTrainer
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_trainer import PPOTrainer

__all__ = [
    "AdaptiveKLController",
    "BaseTrainer",
    "FixedKLController",
    "OnlineTrainer",
    "PPOConfig",
    "PPOTrainer",
    "TrainCallback",
    "TrainResult",
]
