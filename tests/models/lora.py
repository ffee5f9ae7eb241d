"""LoRA on the tiny models."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def lora_config(**settings: Any) -> Any:
    """Adapters on GPT-2's attention."""
    import peft

    defaults = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    return peft.LoraConfig(**(defaults | settings))


def lora(model: Any, **settings: Any) -> Any:
    """`model` with a fresh adapter."""
    import peft

    with warnings.catch_warnings():  # peft asks transformers under an older name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return peft.get_peft_model(model, lora_config(**settings))


def stir(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives the adapters' B matrices, which start at zero, random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "reward" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
