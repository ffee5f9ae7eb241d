"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from trl.data.tokenized import STRATEGIES, Strategy
from trl.functional.supervised import TOKEN_LOSSES
from trl.trainer.offline.stage_config import StageConfig


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class SFTConfig(StageConfig):
    """Settings of `SFTTrainer`: the fields of TRL 1's class, beside those of `StageConfig` and `TrainingArguments`."""

    learning_rate: float = field(default=2e-5, metadata=_help("Peak learning rate of AdamW."))
    chat_template_path: str | None = field(
        default=None,
        metadata=_help("A .jinja file with the chat template, or a folder or hub id whose tokenizer has one."),
    )
    dataset_text_field: str = field(default="text", metadata=_help("Column that holds a row's text."))
    dataset_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("{'skip_prepare_dataset': True} passes the data sets on as they are.")
    )
    eos_token: str | None = field(
        default=None,
        metadata=_help("Token that ends a text and an answer. None: the tokenizer's end-of-sequence token."),
    )
    max_length: int | None = field(
        default=1024, metadata=_help("Tokens of a row; longer ones are truncated. None: no limit.")
    )
    truncation_mode: str = field(
        default="keep_start", metadata=_help("Which end of a row truncation keeps: keep_start or keep_end.")
    )
    shuffle_dataset: bool = field(default=False, metadata=_help("Shuffle the rows once, before they are packed."))
    packing: bool = field(default=False, metadata=_help("Put several sequences into each row of max_length tokens."))
    packing_strategy: str = field(
        default="bfd",
        metadata=_help(
            "bfd: best fit, longest sequence first, what exceeds max_length is cut off; bfd_split: it is split "
            "instead; wrapped: sequences in order, split wherever a row is full."
        ),
    )
    padding_free: bool = field(default=False, metadata=_help("Join the rows of a batch instead of padding them."))
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata=_help("Pad batches to a multiple of this many tokens. auto: as the processor prefers.")
    )
    eval_packing: bool | None = field(default=None, metadata=_help("Pack evaluation rows. None: as packing."))
    completion_only_loss: bool | None = field(
        default=None, metadata=_help("Count the completion alone. None: for rows with a prompt and a completion.")
    )
    assistant_only_loss: bool = field(default=False, metadata=_help("Count the assistant's messages alone; for chats."))
    loss_type: str = field(
        default="nll", metadata=_help("nll, or dft: each token's loss times its probability (arXiv:2508.05629).")
    )
    activation_offloading: bool = field(default=False, metadata=_help("Not supported."))
    router_aux_loss_coef: float | None = field(default=None, metadata=_help("Not supported."))
    max_seq_length: int | None = field(default=None, metadata=_help("Name of max_length before TRL 0.16."))

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            ValueError: if a setting is not supported or has no meaning, or two contradict each other.
        """
        if self.max_seq_length is not None:
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length={self.max_length} must be at least 2: the first token of a row is not predicted"
            )
        for name, allowed in (
            ("truncation_mode", ("keep_start", "keep_end")),
            ("packing_strategy", get_args(Strategy) or STRATEGIES),
            ("loss_type", tuple(TOKEN_LOSSES)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.activation_offloading:
            raise ValueError(
                "activation_offloading=True is not supported: use gradient_checkpointing=True to save memory"
            )
        if self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} is not supported: the loss is that of the tokens "
                "alone"
            )
        if unknown := set(self.dataset_kwargs or {}) - {"skip_prepare_dataset"}:
            raise ValueError(f"dataset_kwargs has {', '.join(sorted(unknown))}: only skip_prepare_dataset is supported")
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise ValueError("packing=True needs max_length, the number of tokens of a packed row")
        flat = self.packing or self.padding_free
        if flat and isinstance(self.pad_to_multiple_of, int):
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} has no meaning: packed and joined rows have no padding"
            )
        super().__post_init__()

    @property
    def multiple(self) -> int | None:
        """Number of tokens of which a padded batch is a multiple; None for any."""
        return self.pad_to_multiple_of if isinstance(self.pad_to_multiple_of, int) else None
