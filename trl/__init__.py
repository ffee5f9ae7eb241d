"""Reinforcement learning for transformer language models.

Names load lazily on first use: `import trl` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trl import legacy

__version__ = "0.5.0.dev0"

_HOMES = {
    "trl.core": ("set_seed",),
    "trl.data.constant_length": ("ConstantLengthDataset",),
    "trl.data.formats": (
        "apply_chat_template",
        "extract_prompt",
        "is_conversational",
        "maybe_apply_chat_template",
        "maybe_extract_prompt",
        "maybe_unpair_preference_dataset",
        "unpair_preference_dataset",
    ),
    "trl.data.sequence_collators": ("DataCollatorForCompletionOnlyLM",),
    "trl.extras": ("BestOfNSampler",),
    "trl.import_utils": ("is_peft_available",),
    "trl.models": (
        "SUPPORTED_ARCHITECTURES",
        "AutoModelForCausalLMWithValueHead",
        "AutoModelForSeq2SeqLMWithValueHead",
        "PreTrainedModelWrapper",
        "create_reference_model",
        "setup_chat_format",
    ),
    "trl.trainer": (
        "AdaptiveKLController",
        "BaseTrainer",
        "FixedKLController",
        "ModelConfig",
        "OnlineTrainer",
        "PPOConfig",
        "PPOTrainer",
        "TrainCallback",
        "TrainResult",
    ),
    "trl.trainer.offline.dpo_config": ("DPOConfig",),
    "trl.trainer.offline.dpo_trainer": ("DPOTrainer",),
    "trl.trainer.offline.kto_config": ("KTOConfig",),
    "trl.trainer.offline.kto_trainer": ("KTOTrainer",),
    "trl.trainer.offline.prm_config": ("PRMConfig",),
    "trl.trainer.offline.prm_trainer": ("PRMTrainer",),
    "trl.trainer.offline.reward_config": ("RewardConfig",),
    "trl.trainer.offline.reward_trainer": ("RewardTrainer",),
    "trl.trainer.model_config": ("get_kbit_device_map", "get_peft_config", "get_quantization_config"),
    "trl.trainer.offline.sft_config": ("SFTConfig",),
    "trl.trainer.offline.sft_trainer": ("SFTTrainer",),
    "trl.state.checkpoints": ("CheckpointError",),
    "trl.training.guards": ("NonFiniteError",),
    "trl.runs.spikes": ("SpikeError", "SpikeSettings"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("algorithms", "core", "extras", "functional", "import_utils", "models", "protocols", "trainer", "types")
_old_name = legacy.lookup(__name__)
legacy.install()

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AdaptiveKLController",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BaseTrainer",
    "BestOfNSampler",
    "CheckpointError",
    "ConstantLengthDataset",
    "DPOConfig",
    "DPOTrainer",
    "DataCollatorForCompletionOnlyLM",
    "FixedKLController",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "NonFiniteError",
    "OnlineTrainer",
    "PPOConfig",
    "PPOTrainer",
    "PRMConfig",
    "PRMTrainer",
    "PreTrainedModelWrapper",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SpikeError",
    "SpikeSettings",
    "TrainCallback",
    "TrainResult",
    "__version__",
    "apply_chat_template",
    "create_reference_model",
    "extract_prompt",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "is_conversational",
    "is_peft_available",
    "maybe_apply_chat_template",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "set_seed",
    "setup_chat_format",
    "unpair_preference_dataset",
]

if TYPE_CHECKING:
    from trl.core import set_seed
    from trl.data.constant_length import ConstantLengthDataset
    from trl.data.formats import (
        apply_chat_template,
        extract_prompt,
        is_conversational,
        maybe_apply_chat_template,
        maybe_extract_prompt,
        maybe_unpair_preference_dataset,
        unpair_preference_dataset,
    )
    from trl.data.sequence_collators import DataCollatorForCompletionOnlyLM
    from trl.extras import BestOfNSampler
    from trl.import_utils import is_peft_available
    from trl.models import (
        SUPPORTED_ARCHITECTURES,
        AutoModelForCausalLMWithValueHead,
        AutoModelForSeq2SeqLMWithValueHead,
        PreTrainedModelWrapper,
        create_reference_model,
        setup_chat_format,
    )
    from trl.runs.spikes import SpikeError, SpikeSettings
    from trl.state.checkpoints import CheckpointError
    from trl.trainer import (
        AdaptiveKLController,
        BaseTrainer,
        FixedKLController,
        ModelConfig,
        OnlineTrainer,
        PPOConfig,
        PPOTrainer,
        TrainCallback,
        TrainResult,
    )
    from trl.trainer.model_config import get_kbit_device_map, get_peft_config, get_quantization_config
    from trl.trainer.offline.dpo_config import DPOConfig
    from trl.trainer.offline.dpo_trainer import DPOTrainer
    from trl.trainer.offline.kto_config import KTOConfig
    from trl.trainer.offline.kto_trainer import KTOTrainer
    from trl.trainer.offline.prm_config import PRMConfig
    from trl.trainer.offline.prm_trainer import PRMTrainer
    from trl.trainer.offline.reward_config import RewardConfig
    from trl.trainer.offline.reward_trainer import RewardTrainer
    from trl.trainer.offline.sft_config import SFTConfig
    from trl.trainer.offline.sft_trainer import SFTTrainer
    from trl.training.guards import NonFiniteError


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value  # later accesses bypass __getattr__
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"trl.{name}")
    return _old_name(name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES, *(name for name in globals() if name.startswith("__"))})
