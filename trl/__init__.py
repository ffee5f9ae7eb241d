"""Reinforcement learning for transformer language models.

Names load lazily on first use: `import trl` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.5.0.dev0"

_HOMES = {
    "trl.core": ("set_seed",),
    "trl.import_utils": ("is_peft_available",),
    "trl.models": (
        "SUPPORTED_ARCHITECTURES",
        "AutoModelForCausalLMWithValueHead",
        "AutoModelForSeq2SeqLMWithValueHead",
        "PreTrainedModelWrapper",
        "create_reference_model",
    ),
    "trl.trainer": (
        "AdaptiveKLController",
        "BaseTrainer",
        "FixedKLController",
        "OnlineTrainer",
        "PPOConfig",
        "PPOTrainer",
        "TrainCallback",
        "TrainResult",
    ),
    "trl.state.checkpoints": ("CheckpointError",),
    "trl.training.guards": ("NonFiniteError",),
    "trl.runs.spikes": ("SpikeError", "SpikeSettings"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("algorithms", "core", "functional", "import_utils", "models", "protocols", "trainer", "types")
_NOT_YET = (
    "BestOfNSampler",
    "ConstantLengthDataset",
    "DataCollatorForCompletionOnlyLM",
    "RewardTrainer",
    "SFTTrainer",
    "compute_accuracy",
    "extras",
)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BaseTrainer",
    "CheckpointError",
    "FixedKLController",
    "NonFiniteError",
    "OnlineTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PreTrainedModelWrapper",
    "SpikeError",
    "SpikeSettings",
    "TrainCallback",
    "TrainResult",
    "__version__",
    "create_reference_model",
    "is_peft_available",
    "set_seed",
]

if TYPE_CHECKING:
    from trl.core import set_seed
    from trl.import_utils import is_peft_available
    from trl.models import (
        SUPPORTED_ARCHITECTURES,
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
        create_reference_model,
    )
    from trl.runs.spikes import SpikeError, SpikeSettings
    from trl.state.checkpoints import CheckpointError
    from trl.trainer import (
        AdaptiveKLController,
        BaseTrainer,
        FixedKLController,
        OnlineTrainer,
        PPOConfig,
        PPOTrainer,
        TrainCallback,
        TrainResult,
    )
    from trl.training.guards import NonFiniteError


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value  # later accesses bypass __getattr__
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"trl.{name}")
    if name in _NOT_YET:
        # Not an AttributeError: `from trl import name` would replace its message with "cannot import name".
        raise ImportError(f"trl.{name} is not part of trl {__version__} yet; TRL 0.4.6 had it", name=name)
    raise AttributeError(f"module 'trl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *(name for name in globals() if name.startswith("__"))})
