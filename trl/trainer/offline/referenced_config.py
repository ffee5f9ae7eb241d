"""Settings that DPO and KTO share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl.data.pairs import Truncation
from trl.trainer.offline.preference_config import PreferenceConfig


@dataclass
class ReferencedConfig(PreferenceConfig):
    """Settings of the stages that compare a policy with a reference.

    Where TRL 1 and TRL 0.7 to 0.11 differ, the defaults are those of TRL 1.
    """

    unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **PreferenceConfig.unsupported,
        "sync_ref_model": ((False,), "the reference is the policy before training"),
        "generate_during_eval": ((False,), "sample from the model in a callback, or after training"),
        "force_use_ref_model": ((False,), "give the model its adapter with peft.get_peft_model, and pass ref_model"),
        "model_adapter_name": ((None,), "the active adapter is trained"),
        "ref_adapter_name": ((None,), "pass a reference as ref_model, or set precompute_ref_log_probs=True"),
        "ref_model_init_kwargs": ((None,), "load the reference yourself, and pass it as ref_model"),
    }

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    beta: float = field(
        default=0.1, metadata={"help": "β: how strongly the policy is held to the reference; > 0. The τ of IPO."}
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "Compute the reference's log-probabilities once, before training, so that no reference model is "
            "kept. None: unless the reference takes no memory anyway, as the base of an adapter does."
        },
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per pass of the reference. None: per_device_train_batch_size."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Maximum tokens of prompt and response; None for no limit."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Maximum tokens of a prompt."})
    truncation_mode: Truncation = field(
        default="keep_start", metadata={"help": "The end that is kept of what is too long: keep_start or keep_end."}
    )
    label_pad_token_id: int = field(
        default=-100, metadata={"help": "Accepted for old scripts: masks come from lengths."}
    )
    padding_value: int | None = field(default=None, metadata={"help": "Accepted for old scripts: padding is masked."})
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "Accepted for old scripts, and checked: follows from the model."}
    )
    generate_during_eval: bool = field(default=False, metadata={"help": "Not supported."})
    force_use_ref_model: bool = field(default=False, metadata={"help": "Not supported."})
    sync_ref_model: bool = field(default=False, metadata={"help": "Not supported."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "Of sync_ref_model, which is not supported."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Of sync_ref_model, which is not supported."})
    model_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    ref_adapter_name: str | None = field(default=None, metadata={"help": "Not supported."})
    ref_model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Not supported."})

    def check(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or out of its range.
        """
        super().check()
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be > 0")
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode={self.truncation_mode!r} must be keep_start or keep_end")
