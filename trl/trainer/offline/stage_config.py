"""Settings that every offline stage adds to `transformers.TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from trl.models.precision import ComputeDtype

C = TypeVar("C", bound="StageConfig")


@dataclass
class StageConfig(TrainingArguments):
    """`TrainingArguments` with the defaults of TRL 1 and the settings that all offline stages share.

    `bf16` and `gradient_checkpointing` are carried out by this library: bfloat16 passes on float32 weights, and
    recomputed layers that work with packed rows.
    """

    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log rows."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute passes in bfloat16, with float32 weights. None: if the processor has fast bfloat16 "
            "products and the model is large enough to benefit."
        },
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass, which saves memory. None: if the model can."},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, if the model is given as an id or a folder."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run a checkpoint's own code when the model is given as an id."}
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Accepted for TRL 1's scripts: texts are tokenised by the tokenizer's own threads."},
    )
    pad_token: str | None = field(
        default=None, metadata={"help": "Padding token. None: the tokenizer's, else its end-of-sequence token."}
    )

    def __post_init__(self) -> None:
        """Checks the settings; takes over what transformers would otherwise do in its own way.

        Raises:
            ValueError: if a setting is not supported, or two contradict each other.
        """
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True is not supported: log-probabilities are computed without logits here as well"
            )
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} is not supported: set it to 0")
        if self.fp16 and self.bf16:
            raise ValueError("fp16=True and bf16=True both set the compute dtype: set only one of them")
        if isinstance(self.model_init_kwargs, str):
            self.model_init_kwargs = json.loads(self.model_init_kwargs)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # or torch warns that there is nothing to pin memory for
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            # The projection to the vocabulary runs outside of the model's forward, where DDP would take it for unused.
            self.ddp_find_unused_parameters = False
        bf16, recompute = self.bf16, self.gradient_checkpointing
        for name in ("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            value = getattr(self, name, None)
            if name == "activation_checkpointing":
                recompute = value if recompute is None else recompute
            elif value and value != {"use_reentrant": False}:
                raise ValueError(f"{name}={value!r} is not supported: leave it out, or give {{'use_reentrant': False}}")
            setattr(self, name, None)
        self.bf16, self.gradient_checkpointing = False, None  # or accelerate and transformers would wrap the model
        super().__post_init__()
        self.bf16, self.gradient_checkpointing = bf16, recompute

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The dtype of passes that `bf16` asks for."""
        return "float32" if self.fp16 else "auto" if self.bf16 is None else "bfloat16" if self.bf16 else "float32"

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """A copy of `model_init_kwargs`."""
        return dict(self.model_init_kwargs) if isinstance(self.model_init_kwargs, dict) else {}

    @classmethod
    def from_arguments(cls: type[C], args: TrainingArguments | None, *, output_dir: str) -> C:
        """Returns `args` as this class: unchanged if it is one, or with its values if it is a `TrainingArguments`.

        Args:
            args: None for the defaults.
            output_dir: the folder if there are no `args`.

        Raises:
            ValueError: if `args` is of another type.
        """
        if args is None:
            return cls(output_dir=output_dir)
        if isinstance(args, cls):
            return args
        if not isinstance(args, TrainingArguments) or isinstance(args, StageConfig):
            raise ValueError(
                f"args is a {type(args).__name__}: expected a {cls.__name__} or transformers.TrainingArguments"
            )
        return cls(**{entry.name: getattr(args, entry.name) for entry in fields(args) if entry.init})
