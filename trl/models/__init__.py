"""Value-head models, reference models, and evaluation of rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl import legacy
from trl.models.adapters import adapter_starts_at_zero, reference_mode
from trl.models.autos import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models.chat_format import setup_chat_format
from trl.models.evaluate import evaluate, evaluate_exact_kl, frozen_states
from trl.models.frozen import RolloutAboveFrozen, frozen_depth, shares_frozen
from trl.models.generation import unwrap_model_for_generation
from trl.models.predictions import abilities
from trl.models.reference import create_reference_model
from trl.models.value_head import ValueHead
from trl.models.wrapper import PreTrainedModelWrapper

SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "RolloutAboveFrozen",
    "ValueHead",
    "abilities",
    "adapter_starts_at_zero",
    "create_reference_model",
    "evaluate",
    "evaluate_exact_kl",
    "frozen_depth",
    "frozen_states",
    "reference_mode",
    "setup_chat_format",
    "shares_frozen",
    "unwrap_model_for_generation",
]

if not TYPE_CHECKING:  # type checkers go on refusing unknown names
    __getattr__ = legacy.lookup(__name__)
