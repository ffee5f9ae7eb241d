"""The two value-head models."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trl.models.wrapper import PreTrainedModelWrapper


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder (GPT-2, Llama, Mamba ...) with a value head."""

    transformers_parent_class: ClassVar[Any] = AutoModelForCausalLM


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder (T5, BART ...) with a value head on its decoder."""

    transformers_parent_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_projection"]

    def __init__(self, pretrained_model: Any = None, **kwargs: Any) -> None:
        super().__init__(pretrained_model, **kwargs)
        if not self.is_encoder_decoder:
            raise ValueError(
                f"{type(self.config).__name__} is no encoder-decoder; use AutoModelForCausalLMWithValueHead"
            )
