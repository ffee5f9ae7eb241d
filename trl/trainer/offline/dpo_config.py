"""Settings of `DPOTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.data.pairs import Truncation
from trl.trainer.offline.pair_losses import SMOOTHED, WITHOUT_REFERENCE, check_loss_types
from trl.trainer.offline.preference_config import PreferenceConfig


@dataclass
class DPOConfig(PreferenceConfig):
    """Settings of `DPOTrainer`: those of `transformers.TrainingArguments` and `PreferenceConfig`, and the following.

    Where TRL 1 and TRL 0.7 to 0.11 differ, the defaults are those of TRL 1.
    """

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **PreferenceConfig.unsupported,
        "sync_ref_model": ((False,), "the reference is the policy before training"),
        "f_divergence_type": (("reverse_kl",), "use reverse_kl, or another loss_type"),
        "ld_alpha": ((None, 1.0), "use loss_type='sigmoid_norm' against a bias to long responses"),
        "use_weighting": ((False,), "leave it out"),
        "padding_free": ((False,), "rows are packed wherever the model allows it: leave it out"),
        "model_adapter_name": ((None,), "the active adapter is trained"),
        "ref_adapter_name": ((None,), "pass a reference as ref_model, or compute its log-probabilities once"),
        "ref_model_init_kwargs": ((None,), "load the reference yourself, and pass it as ref_model"),
    }

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(
        default=0.1,
        metadata={"help": "β: how strongly the policy is held to the reference; for IPO the paper's τ. > 0."},
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Loss, or several that are added: sigmoid, sigmoid_norm, robust, hinge, ipo, apo_zero, apo_down, simpo, "
            "sft, odds_ratio. ORPO is sft and odds_ratio."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss; None weighs all with 1."}
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "ε: probability that a preference is the wrong way round, in [0, 0.5). Conservative DPO with sigmoid and "
            "sigmoid_norm, robust DPO with robust."
        },
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "γ: the margin of rewards that simpo aims for."})
    reference_free: bool = field(
        default=False, metadata={"help": "Take a reference under which every response is equally likely."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probabilities once, before training, so that no reference model is kept. "
            "None does so unless the reference is in memory anyway: the base of an adapter."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per pass of the reference; None takes per_device_train_batch_size."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Maximum tokens of prompt and response; None for no limit."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Maximum tokens of a prompt."})
    max_target_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of a response of an encoder-decoder."}
    )
    truncation_mode: Truncation = field(
        default="keep_start",
        metadata={"help": "The end that is kept of what is too long: keep_start or keep_end."},
    )
    sync_ref_model: bool = field(default=False, metadata={"help": "Not supported."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Of sync_ref_model, which is not supported."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Of sync_ref_model, which is not supported."})
    f_divergence_type: str = field(default="reverse_kl", metadata={"help": "Only reverse_kl is supported."})
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Of f_divergence_type='alpha_divergence'."})
    ld_alpha: float | None = field(default=None, metadata={"help": "Not supported."})
    use_weighting: bool = field(default=False, metadata={"help": "Not supported."})
    padding_free: bool = field(default=False, metadata={"help": "Not supported: rows are packed where they can be."})
    discopop_tau: float = field(default=0.05, metadata={"help": "Of loss_type='discopop', which is not supported."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    ref_model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Not supported."})

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
                f"loss_weights={self.loss_weights} must be as many as loss_type={self.loss_type}: {len(self.loss_type)}"
            )
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be > 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        if self.label_smoothing and not SMOOTHED & set(self.loss_type):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} changes {', '.join(sorted(SMOOTHED))}, but loss_type is "
                f"{self.loss_type}: set it to 0, or choose one of those"
            )
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode={self.truncation_mode!r} must be keep_start or keep_end")

    @property
    def weights(self) -> list[float]:
        """The weight of each loss."""
        return [1.0] * len(self.loss_type) if self.loss_weights is None else list(self.loss_weights)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares the policy with a reference."""
        return not self.reference_free and not set(self.loss_type) <= WITHOUT_REFERENCE
