"""Public trainers and their configurations."""

from typing import TYPE_CHECKING

from trl import legacy
from trl.runs.callbacks import TrainCallback
from trl.runs.options import TrainResult
from trl.trainer.base import BaseTrainer
from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController
from trl.trainer.model_config import ModelConfig
from trl.trainer.online import OnlineTrainer
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import disable_dropout_in_model
from trl.training.running_moments import RunningMoments

__all__ = [
    "AdaptiveKLController",
    "BaseTrainer",
    "FixedKLController",
    "ModelConfig",
    "OnlineTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RunningMoments",
    "TrainCallback",
    "TrainResult",
    "disable_dropout_in_model",
]

if not TYPE_CHECKING:  # type checkers go on refusing unknown names
    __getattr__ = legacy.lookup(__name__)
