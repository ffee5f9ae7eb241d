"""Public trainers and their configurations.

Names load lazily on first use, so that settings can be checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl import legacy

_HOMES = {
    "trl.runs.callbacks": ("TrainCallback",),
    "trl.runs.options": ("TrainResult",),
    "trl.trainer.base": ("BaseTrainer",),
    "trl.trainer.kl_controllers": ("AdaptiveKLController", "FixedKLController"),
    "trl.trainer.model_config": ("ModelConfig",),
    "trl.trainer.online": ("OnlineTrainer",),
    "trl.trainer.ppo_config": ("PPOConfig",),
    "trl.trainer.ppo_trainer": ("PPOTrainer",),
    "trl.trainer.utils": ("disable_dropout_in_model",),
    "trl.training.running_moments": ("RunningMoments",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = tuple(home.rpartition(".")[2] for home in _HOMES if home.startswith("trl.trainer."))
_old_name = legacy.lookup(__name__)

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

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # type checkers still report unknown names

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
            globals()[name] = value  # later accesses bypass __getattr__
            return value
        if name in _SUBMODULES:
            return importlib.import_module(f"trl.trainer.{name}")
        return _old_name(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
