"""`ModelConfig`: the command line of a script, and what peft and transformers make of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

from trl import ModelConfig, get_kbit_device_map, get_peft_config, get_quantization_config
from trl.trainer import model_config


def test_defaults_are_those_of_0_11() -> None:
    config = ModelConfig()
    assert (config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_task_type) == (16, 32, 0.05, "CAUSAL_LM")
    assert (config.model_revision, config.bnb_4bit_quant_type) == ("main", "nf4")
    assert config.to_dict()["lora_r"] == 16


def test_fields_come_from_a_command_line() -> None:
    command = (
        "--model_name_or_path gpt2 --use_peft --lora_r 4 --lora_target_modules q_proj v_proj --torch_dtype bfloat16"
    )
    (config,) = HfArgumentParser(ModelConfig).parse_args_into_dataclasses(args=command.split())
    assert (config.model_name_or_path, config.use_peft, config.lora_r) == ("gpt2", True, 4)
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert config.torch_dtype == "bfloat16"


def test_a_list_of_one_target_is_that_target() -> None:
    assert ModelConfig(lora_target_modules=["all-linear"]).lora_target_modules == "all-linear"
    assert ModelConfig(lora_target_modules=["a", "b"]).lora_target_modules == ["a", "b"]


def test_two_quantizations_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="load_in_8bit and load_in_4bit are both set"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)


def test_no_adapter_without_use_peft() -> None:
    assert get_peft_config(ModelConfig(lora_r=4)) is None


def test_adapter_has_the_settings_given() -> None:
    pytest.importorskip("peft")
    config = get_peft_config(
        ModelConfig(
            use_peft=True,
            lora_r=4,
            lora_alpha=8,
            lora_dropout=0.25,
            lora_target_modules=["q_proj", "v_proj"],
            lora_modules_to_save=["score"],
            lora_task_type="SEQ_CLS",
            use_rslora=True,
        )
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 8, 0.25, "none")
    assert (config.target_modules, config.modules_to_save) == ({"q_proj", "v_proj"}, ["score"])
    assert (config.task_type, config.use_rslora) == ("SEQ_CLS", True)


def test_quantization_has_the_settings_given() -> None:
    assert get_quantization_config(ModelConfig()) is None
    eight = get_quantization_config(ModelConfig(load_in_8bit=True))
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    four = get_quantization_config(
        ModelConfig(load_in_4bit=True, torch_dtype="bfloat16", bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    )
    assert (four.load_in_8bit, four.load_in_4bit) == (False, True)
    assert four.bnb_4bit_compute_dtype is torch.bfloat16
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("fp4", True)


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_quantized_products_are_float32_unless_a_dtype_is_named(dtype: str | None) -> None:
    config = get_quantization_config(ModelConfig(load_in_4bit=True, torch_dtype=dtype))
    assert config.bnb_4bit_compute_dtype is torch.float32


@pytest.mark.parametrize(
    ("cuda", "xpu", "expected"), [(False, False, None), (True, False, {"": 2}), (False, True, {"": 2})]
)
def test_a_quantized_model_goes_to_the_gpu_of_its_process(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, xpu: bool, expected: dict[str, int] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(model_config, "is_xpu_available", lambda: xpu)
    monkeypatch.setattr(model_config, "PartialState", lambda: SimpleNamespace(local_process_index=2))
    assert get_kbit_device_map() == expected
