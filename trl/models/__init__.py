"""Value-head models, reference models, and evaluation of rollouts."""

from __future__ import annotations

from trl.models.adapters import adapter_starts_at_zero, reference_mode
from trl.models.autos import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models.evaluate import evaluate, evaluate_exact_kl, frozen_states
from trl.models.frozen import RolloutAboveFrozen, frozen_depth, shares_frozen
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
    "shares_frozen",
]
