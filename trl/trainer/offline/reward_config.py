"""Settings of `RewardTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.trainer.offline.preference_config import PreferenceConfig


@dataclass
class RewardConfig(PreferenceConfig):
    """Settings of `RewardTrainer`, beside those of `transformers.TrainingArguments` and `PreferenceConfig`."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **PreferenceConfig.unsupported,
        "chat_template_path": ((None,), "set tokenizer.chat_template, or call trl.setup_chat_format(model, tokenizer)"),
    }

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Maximum tokens of a text; longer rows are left out. None for no limit."}
    )
    center_rewards_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the pull of each pair's rewards to a mean of 0; 0.01 is recommended. None for none."
        },
    )
    append_eos: bool = field(
        default=False,
        metadata={
            "help": "End each plain text with the tokenizer's eos token. trl.rewards.ClassifierReward scores texts "
            "without one."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "End-of-sequence token to set on the tokenizer and the model."}
    )
    chat_template_path: str | None = field(default=None, metadata={"help": "Not supported."})
