"""`ModelConfig`: a script's model, adapter and quantization settings, converted for peft and transformers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import PartialState

from trl import legacy
from trl.core import flatten_dict
from trl.import_utils import is_xpu_available
from trl.models.adapters import require_peft


@dataclass
class ModelConfig:
    """Settings of a model, for `transformers.HfArgumentParser`; this library itself does not read them.

    Raises:
        ValueError: if both `load_in_8bit` and `load_in_4bit` are set.
    """

    model_name_or_path: str | None = None
    """Folder or hub id of the model."""
    model_revision: str = "main"
    """Branch, tag or commit on the hub."""
    torch_dtype: str | None = None
    """Dtype of the weights: "auto", "bfloat16", "float16" or "float32"."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""
    attn_implementation: str | None = None
    """Attention of transformers, such as "sdpa" or "flash_attention_2"."""
    use_peft: bool = False
    """Train a LoRA adapter (`get_peft_config`)."""
    lora_r: int | None = 16
    """Rank of the adapter."""
    lora_alpha: int | None = 32
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float | None = 0.05
    """Dropout before the adapter."""
    lora_target_modules: list[str] | None = None
    """Names of the layers under the adapter; None leaves it to peft. A list of one becomes that name."""
    lora_modules_to_save: list[str] | None = None
    """Names of layers to train and save whole."""
    lora_task_type: str = "CAUSAL_LM"
    """Task type of peft."""
    use_rslora: bool = False
    """Scale by lora_alpha / √lora_r (rank-stabilised LoRA)."""
    load_in_8bit: bool = False
    """Quantize to 8 bits (`get_quantization_config`)."""
    load_in_4bit: bool = False
    """Quantize to 4 bits (`get_quantization_config`)."""
    bnb_4bit_quant_type: Literal["fp4", "nf4"] | None = "nf4"
    """Number format in 4 bits."""
    use_bnb_nested_quant: bool = False
    """Quantize the scales of the 4-bit blocks, too."""

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are both set: a model is loaded in one of them")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            # peft reads a string as a pattern: "all-linear" and expressions are given like this on a command line.
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a flat dictionary."""
        return flatten_dict(asdict(self))


def get_peft_config(model_config: ModelConfig) -> Any:
    """Returns the `peft.LoraConfig` of a `ModelConfig`, or None without `use_peft`.

    Raises:
        ImportError: if peft is needed and not installed.
    """
    if not model_config.use_peft:
        return None
    # peft reads a string as a pattern of the whole path, which a bare name would not match.
    targets = model_config.lora_target_modules
    return require_peft("use_peft").LoraConfig(
        task_type=model_config.lora_task_type,
        r=model_config.lora_r,
        target_modules=[targets] if isinstance(targets, str) and targets.isidentifier() else targets,
        lora_alpha=model_config.lora_alpha,
        lora_dropout=model_config.lora_dropout,
        bias="none",
        use_rslora=model_config.use_rslora,
        modules_to_save=model_config.lora_modules_to_save,
    )


def get_quantization_config(model_config: ModelConfig) -> Any:
    """Returns the `transformers.BitsAndBytesConfig` of a `ModelConfig`, or None if the model is not quantized."""
    from transformers import BitsAndBytesConfig

    if model_config.load_in_4bit:
        dtype = model_config.torch_dtype
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=None if dtype == "auto" else dtype,  # "auto" is known only once the model is loaded
            bnb_4bit_quant_type=model_config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_config.use_bnb_nested_quant,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_config.load_in_8bit else None


def get_kbit_device_map() -> dict[str, int] | None:
    """Returns a `device_map` that puts a quantized model on this process's GPU; None on a CPU."""
    on_gpu = torch.cuda.is_available() or is_xpu_available()
    return {"": PartialState().local_process_index} if on_gpu else None


if not TYPE_CHECKING:  # type checkers still report unknown names
    __getattr__ = legacy.lookup(__name__)
