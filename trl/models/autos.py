"""Value-head models for decoders and encoder-decoders."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from trl.models.wrapper import PreTrainedModelWrapper

_HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class AutoModelForCausalLMWithValueHead(PreTrainedModelWrapper):
    """A decoder-only language model (GPT-2, Llama, Mamba ...) with a value head."""

    transformers_parent_class: ClassVar[Any] = AutoModelForCausalLM
    supported_args: ClassVar[tuple[str, ...] | None] = _HEAD_ARGUMENTS

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        super().__init__(pretrained_model, **kwargs)
        if self.is_encoder_decoder:
            raise ValueError(
                f"{type(self.config).__name__} is an encoder-decoder; use AutoModelForSeq2SeqLMWithValueHead"
            )


class AutoModelForSeq2SeqLMWithValueHead(PreTrainedModelWrapper):
    """An encoder-decoder (T5, BART ...) with a value head on its decoder."""

    transformers_parent_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    lm_head_namings: ClassVar[list[str]] = ["lm_head", "embed_out", "output_projection"]
    supported_args: ClassVar[tuple[str, ...] | None] = _HEAD_ARGUMENTS

    def __init__(self, pretrained_model: Any, **kwargs: Any) -> None:
        super().__init__(pretrained_model, **kwargs)
        if not self.is_encoder_decoder:
            raise ValueError(
                f"{type(self.config).__name__} is not an encoder-decoder; use AutoModelForCausalLMWithValueHead"
            )
