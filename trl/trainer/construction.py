"""Checks and builds the parts of a trainer: accelerator, model, reference and optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from trl.kernels.allocator import keep_freed_memory
from trl.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)
from trl.models.adapters import adapter_starts_at_zero
from trl.models.reference import check_reference
from trl.models.trunk import is_encoder_decoder
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.tracking import NamedTracker, tracker_names
from trl.training.optimizers import check_optimizer, check_scheduler, make_adam
from trl.training.processes import check_same, make_accelerator
from trl.training.resume import settings_of

logger = logging.getLogger(__name__)

# Settings that may differ between processes: names, and the seed of a loop of the user's own.
_MAY_DIFFER = ("seed", "task_name", "model_name", "tracker_project_name")
# Settings that only PPO reads.
_PPO_SETTINGS = (
    "adap_kl_ctrl", "init_kl_coef", "target", "horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef",
    "kl_penalty", "whiten_rewards", "use_score_scaling", "use_score_norm", "score_clip", "missing_eos_penalty",
    "dual_clip", "value_warmup_steps", "loss_denominator", "importance_cap",
)  # fmt: skip


def check_parts(config: Any, model: Any, tokenizer: Any, optimizer: Any, lr_scheduler: Any) -> None:
    """Checks the types of a trainer's arguments, and that optimizer and scheduler fit.

    Raises:
        ValueError: if an argument has the wrong type, if the optimizer holds none of the model's trainable parameters,
            or if the scheduler needs a metric at each step.
    """
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
    if not isinstance(model, PreTrainedModelWrapper):
        raise ValueError(
            f"model must have a value head, not be a {type(model).__name__}: load it with "
            "AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer must be a torch optimizer, not {type(optimizer).__name__}")
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch learning-rate scheduler, not {type(lr_scheduler).__name__}")
    if optimizer is not None:
        check_optimizer(optimizer, model)
    if lr_scheduler is not None:
        check_scheduler(lr_scheduler, optimizer)


def start_accelerator(config: PPOConfig) -> Accelerator:
    """Joins the processes of the launch and registers the trackers. Every process must call this.

    Raises:
        ValueError: if settings other than seed and names differ between processes.
    """
    accelerator = make_accelerator(
        project_config=ProjectConfiguration(**config.project_kwargs),
        **config.accelerator_kwargs,
    )
    check_same(accelerator, {k: v for k, v in settings_of(config).items() if k not in _MAY_DIFFER})
    if config.keep_memory and accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.is_main_process:
        accelerator.trackers = [NamedTracker(name, config) for name in tracker_names(config.log_with)]
    return accelerator


def make_reference(
    model: PreTrainedModelWrapper, ref_model: Any, num_shared_layers: int | None
) -> PreTrainedModelWrapper | None:
    """Reference model for the KL; None if it is `model` with its adapter disabled, or with its reference adapter."""
    if ref_model is not None:
        if model.reference_adapter_name is not None:
            raise ValueError(
                f"ref_model and the reference adapter {model.reference_adapter_name!r} are two references: pass "
                "ref_model=None"
            )
        if not isinstance(ref_model, PreTrainedModelWrapper):
            raise ValueError(
                f"ref_model must have a value head, not be a {type(ref_model).__name__}: create it with "
                "create_reference_model(model)"
            )
        check_reference(ref_model, model)
        if num_shared_layers is not None:
            warnings.warn(
                f"num_shared_layers={num_shared_layers} is ignored because a ref_model is given", stacklevel=4
            )
        return ref_model
    if not model.is_peft_model:
        return create_reference_model(model, num_shared_layers=num_shared_layers)
    if num_shared_layers is not None:
        warnings.warn(
            f"num_shared_layers={num_shared_layers} is ignored: with an adapter, the reference is the model without it",
            stacklevel=4,
        )
    if model.reference_adapter_name is not None or adapter_starts_at_zero(model):
        return None
    logger.warning(
        "the adapter does not start at zero, so disabling it does not give the initial policy: using a frozen copy of "
        "the whole model as the reference; from_pretrained(..., reference_adapter=) takes the adapter alone instead"
    )
    return create_reference_model(model)


def make_optimizer(
    config: PPOConfig, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer:
    """The given optimizer, or Adam at `config.learning_rate`; warns if the trained weights are half precision."""
    if half_dtypes := {str(p.dtype) for p in trained if p.dtype in (torch.bfloat16, torch.float16)}:
        logger.warning(
            "the trained weights are %s, which loses updates smaller than their spacing%s. For half-precision compute "
            "with float32 weights, load them in float32 and set accelerator_kwargs={'mixed_precision': 'bf16'}",
            ", ".join(sorted(half_dtypes)),
            ", and Adam's second moment underflows to 0, which makes updates far too large"
            if str(torch.float16) in half_dtypes
            else "",
        )
    if optimizer is None:
        return make_adam(trained, float(config.learning_rate or 0), narrow=config.optimizer_state_dtype != "float32")
    if config.optimizer_state_dtype != "float32":
        raise ValueError(
            f"optimizer_state_dtype={config.optimizer_state_dtype!r} applies to the trainer's own Adam, not to the "
            f"given {type(optimizer).__name__}"
        )
    return optimizer


def critic_free(model: Any) -> Any:
    """Wraps a model with an unused, frozen value head.

    Args:
        model: a transformers language model, a PEFT model, or one with a value head, which is frozen.

    Raises:
        ValueError: if it is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model and ref_model must be language models, not {type(model).__name__}: load them with transformers' "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    if not isinstance(model, PreTrainedModelWrapper):
        seq2seq = is_encoder_decoder(model)
        wrapper = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
        model = wrapper.from_pretrained(model)
        for parameter in model.v_head.parameters():
            nn.init.zeros_(parameter)  # identical on every process and in a resumed run
    model.v_head.requires_grad_(False)
    return model


def check_unused_settings(config: Any, algorithm: str) -> None:
    """Rejects changes to settings that only PPO reads.

    Raises:
        ValueError: if a setting would be ignored; names each.
    """
    if not isinstance(config, PPOConfig):
        return
    defaults = {f.name: f.default for f in fields(PPOConfig)}
    if changed := [name for name in _PPO_SETTINGS if getattr(config, name) != defaults[name]]:
        raise ValueError(
            f"{', '.join(changed)}: only PPO uses these settings; {algorithm} takes its own as arguments of the "
            "algorithm"
        )
