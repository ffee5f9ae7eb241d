"""Settings of `KTOTrainer`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.offline.referenced_config import ReferencedConfig

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass
class KTOConfig(ReferencedConfig):
    """Settings of `KTOTrainer`: those of `transformers.TrainingArguments` and `ReferencedConfig`, and the following."""

    per_device_train_batch_size: int = field(
        default=8,
        metadata={"help": "Rows per pass; at least 2, since each prompt is also paired with another's response."},
    )
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "kto needs sequential: the responses of a batch, paired with each other's prompts, estimate the "
            "KL. Shuffle the data beforehand.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )
    loss_type: str = field(
        default="kto", metadata={"help": "kto, or apo_zero_unpaired, which takes the KL for 0.", "choices": LOSS_TYPES}
    )
    desirable_weight: float = field(default=1.0, metadata={"help": "Weight of the losses of desirable responses."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of the losses of undesirable responses."})
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a response; it loses its end."}
    )

    @property
    def estimates_kl(self) -> bool:
        """Whether the loss has a baseline."""
        return self.loss_type == "kto"

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        super().check()
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r} must be one of {', '.join(LOSS_TYPES)}")
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if not self.estimates_kl:
            return
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size=1: KTO estimates the KL by pairing each prompt with the response of "
                "another row of the batch. Set it to 2 or more, and gradient_accumulation_steps lower, or use "
                "loss_type='apo_zero_unpaired'"
            )
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r}: the pairs that estimate KTO's KL are made "
                "of neighbouring rows. Set it to 'sequential', and shuffle the data beforehand"
            )

    @classmethod
    def from_arguments(cls, args: Any, *, output_dir: str) -> KTOConfig:
        """As `StageConfig.from_arguments`; plain `TrainingArguments` get the sequential order."""
        if args is not None and not isinstance(args, ReferencedConfig) and args.train_sampling_strategy == "random":
            args = copy.copy(args)
            args.train_sampling_strategy = "sequential"
        return super().from_arguments(args, output_dir=output_dir)
