"""Checks and builds the parts of a trainer: model, reference and optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

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
from trl.training.optimizers import check_optimizer, check_scheduler, make_adam

logger = logging.getLogger(__name__)

# Settings that only PPO reads.
_PPO_ALONE = (
    "adap_kl_ctrl", "init_kl_coef", "target", "horizon", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef",
    "kl_penalty", "whiten_rewards", "use_score_scaling", "use_score_norm", "score_clip", "missing_eos_penalty", "dual_clip",
    "value_warmup_steps", "loss_denominator", "importance_cap",
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


def make_reference(
    model: PreTrainedModelWrapper, ref_model: Any, num_shared_layers: int | None
) -> PreTrainedModelWrapper | None:
    """Reference model for the KL; None if it is `model` with its adapter disabled."""
    if ref_model is not None:
        if not isinstance(ref_model, PreTrainedModelWrapper):
            raise ValueError(
                f"ref_model must have a value head, not be a {type(ref_model).__name__}: make it with "
                "create_reference_model(model)"
            )
        check_reference(ref_model, model)
        if num_shared_layers is not None:
            warnings.warn(f"num_shared_layers={num_shared_layers} is ignored, since a ref_model is given", stacklevel=5)
        return ref_model
    if not model.is_peft_model:
        return create_reference_model(model, num_shared_layers=num_shared_layers)
    if num_shared_layers is not None:
        warnings.warn(
            f"num_shared_layers={num_shared_layers} is ignored: with an adapter, the reference is the model without it",
            stacklevel=5,
        )
    if adapter_starts_at_zero(model):
        return None
    logger.warning(
        "the adapter is not at zero at the start, so that the model without it is not where training starts: the "
        "reference is a frozen copy of the whole model"
    )
    return create_reference_model(model)


def make_optimizer(
    config: PPOConfig, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> torch.optim.Optimizer:
    """The given optimizer, or Adam at `config.learning_rate`; warns of trained weights that are too coarse for it."""
    if narrow := {str(p.dtype) for p in trained if p.dtype in (torch.bfloat16, torch.float16)}:
        logger.warning(
            "the trained weights are %s: an update smaller than their spacing is lost%s. For half-precision compute with "
            "float32 weights, load them in float32 and set accelerator_kwargs={'mixed_precision': 'bf16'}",
            ", ".join(sorted(narrow)),
            ", and Adam's second moment underflows to 0, which makes its updates far too large"
            if str(torch.float16) in narrow
            else "",
        )
    if optimizer is None:
        return make_adam(trained, float(config.learning_rate or 0), narrow=config.optimizer_state_dtype != "float32")
    if config.optimizer_state_dtype != "float32":
        raise ValueError(
            f"optimizer_state_dtype={config.optimizer_state_dtype!r} is for the Adam that the trainer makes, not for the "
            f"{type(optimizer).__name__} that is given"
        )
    return optimizer


def critic_free(model: Any) -> Any:
    """The model in a wrapper whose value head takes no part in training; anything but a model is returned as it is.

    Args:
        model: a transformers language model, a PEFT model, or one with a value head, which is frozen.
    """
    if isinstance(model, nn.Module) and not isinstance(model, PreTrainedModelWrapper):
        separate = is_encoder_decoder(model)
        kind = AutoModelForSeq2SeqLMWithValueHead if separate else AutoModelForCausalLMWithValueHead
        model = kind.from_pretrained(model)
        for parameter in model.v_head.parameters():
            nn.init.zeros_(parameter)  # the same in every process and in a resumed run
    if isinstance(model, PreTrainedModelWrapper):
        model.v_head.requires_grad_(False)
    return model


def check_unused_settings(config: Any, algorithm: str) -> None:
    """Checks that settings which belong to PPO alone have their defaults.

    Raises:
        ValueError: if one has another value, which would be ignored.
    """
    if not isinstance(config, PPOConfig):
        return
    defaults = {f.name: f.default for f in fields(PPOConfig)}
    if changed := [name for name in _PPO_ALONE if getattr(config, name) != defaults[name]]:
        raise ValueError(
            f"{', '.join(changed)}: settings of PPO, which {algorithm} does not read; its own are arguments of the algorithm"
        )
