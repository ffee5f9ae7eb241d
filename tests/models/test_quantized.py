"""QLoRA: PPO on a 4-bit or 8-bit base where bitsandbytes is installed, and the hint where it is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from transformers import AutoModelForCausalLM

from tests.helpers import assert_close, tiny_llama, tiny_tokenizer
from tests.models.lora import lora_config
from tests.trainer.managed import run
from trl import AutoModelForCausalLMWithValueHead as Causal
from trl import PPOConfig, PPOTrainer

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(hidden_size=64, intermediate_size=64, num_key_value_heads=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path, bits: str) -> Any:
    torch.manual_seed(0)
    config = lora_config(target_modules=["q_proj"], fan_in_fan_out=False)
    return Causal.from_pretrained(base, peft_config=config, **{bits: True})


@pytest.mark.skipif(INSTALLED, reason="bitsandbytes is installed")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_without_bitsandbytes_the_error_says_what_to_install(base: Path, bits: str) -> None:
    with pytest.raises(ImportError, match=r"pip install .*bitsandbytes"):
        load(base, bits)


def test_layers_of_a_4_bit_model_keep_the_product_that_has_a_gradient(base: Path, monkeypatch: Any) -> None:
    """What loading does with bitsandbytes' layers, on a model that says it is quantized."""
    model = tiny_llama()
    model.is_loaded_in_4bit = True
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    monkeypatch.setattr("trl.models.loading.load_model", lambda *args, **kwargs: model)
    assert Causal.from_pretrained(base).pretrained_model is model
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.skipif(not INSTALLED, reason="needs bitsandbytes: pip install bitsandbytes")
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_ppo_on_a_quantized_base(base: Path, tmp_path: Path, bits: str) -> None:
    def trainer() -> PPOTrainer:
        config = PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-2)
        return PPOTrainer(config, load(base, bits), None, tiny_tokenizer())

    run(trainer(), steps=2, run_dir=tmp_path / "run")
    resumed = trainer()
    run(resumed, steps=3, run_dir=tmp_path / "run", resume=True)
    moved = [p for name, p in resumed.model.named_parameters() if "lora_B" in name]
    assert all(bool(p.any()) for p in moved)
    with pytest.raises(ValueError, match="quantized base without loss"):
        resumed.model.save_merged(tmp_path / "merged")
    resumed.save_pretrained(tmp_path / "adapter")
    float_model = Causal.from_pretrained(tmp_path / "adapter").eval()
    float_model.save_merged(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(plain(TOKENS).logits, float_model(TOKENS)[0])
