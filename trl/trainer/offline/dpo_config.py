"""Settings of `DPOTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.trainer.offline.pair_losses import SMOOTHED, WITHOUT_REFERENCE, check_loss_types
from trl.trainer.offline.referenced_config import ReferencedConfig


@dataclass
class DPOConfig(ReferencedConfig):
    """Settings of `DPOTrainer`: those of `transformers.TrainingArguments` and `ReferencedConfig`, and the following."""

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **ReferencedConfig.unsupported,
        "f_divergence_type": (("reverse_kl",), "leave it out, or choose another loss_type"),
        "ld_alpha": ((None, 1.0), "loss_type='sigmoid_norm' also counters a bias to long responses"),
        "use_weighting": ((False,), "leave it out"),
        "padding_free": ((False,), "rows are packed wherever the model allows it: leave it out"),
        "rpo_alpha": ((None,), "add 'sft' to loss_type, and its weight to loss_weights"),
    }

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Loss, or several that are added: sigmoid, sigmoid_norm, robust, hinge, ipo, apo_zero, apo_down, "
            "simpo, sft, odds_ratio. ORPO is sft and odds_ratio."
        },
    )
    loss_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each loss. None: 1 for each."})
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "ε: probability that a preference is the wrong way round, in [0, 0.5). Conservative DPO with "
            "sigmoid and sigmoid_norm, robust DPO with robust."
        },
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "γ: the margin of rewards that simpo aims for."})
    reference_free: bool = field(
        default=False, metadata={"help": "Take a reference under which all responses are equally likely."}
    )
    max_target_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a response; it loses its end."}
    )
    f_divergence_type: str = field(default="reverse_kl", metadata={"help": "Only reverse_kl is supported."})
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Of f_divergence_type='alpha_divergence'."})
    ld_alpha: float | None = field(default=None, metadata={"help": "Not supported."})
    use_weighting: bool = field(default=False, metadata={"help": "Not supported."})
    padding_free: bool = field(default=False, metadata={"help": "Not supported: rows are packed where they can be."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Of loss_type='discopop', which is not supported."})
    rpo_alpha: float | None = field(default=None, metadata={"help": "Not supported: use loss_weights."})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().check()
        check_loss_types(self.loss_type)
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights={self.loss_weights} has {len(self.loss_weights)} weights, but "
                f"loss_type={self.loss_type} has {len(self.loss_type)} losses: give one weight for each"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and not SMOOTHED & set(self.loss_type):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} does not change loss_type={self.loss_type}: set it to 0, or "
                f"use one of {', '.join(sorted(SMOOTHED))}"
            )

    @property
    def weights(self) -> list[float]:
        """The weight of each loss."""
        return [1.0] * len(self.loss_type) if self.loss_weights is None else list(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares the policy with a reference."""
        return not self.reference_free and not set(self.loss_type) <= WITHOUT_REFERENCE
