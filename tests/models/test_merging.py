"""Merging an adapter: the plain folder's logits, the value head, and a model that does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora_config, stir
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LLAMA = {"fan_in_fan_out": False}


def trained(make: Any, **config: Any) -> Any:
    """A model whose adapter, and whatever else it trains, has moved."""
    model = Causal.from_pretrained(make(), peft_config=lora_config(**config)).eval()
    stir(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_embedding_A" in name or "lora" not in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_gpt2, {}),
        (tiny_gpt2, {"use_dora": True}),
        (tiny_gpt2, {"use_rslora": True, "lora_alpha": 3}),
        (tiny_gpt2, {"modules_to_save": ["ln_f"]}),
        (tiny_llama, {"target_modules": ["q_proj", "v_proj", "lm_head"], **LLAMA}),
        (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **LLAMA}),
        (tiny_llama, {"target_modules": ["embed_tokens"], **LLAMA}),
    ],
)
def test_a_merged_folder_is_a_plain_model_with_the_same_logits(
    make: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(make, **config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits, _, values = model(TOKENS)
    model.save_merged(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if "adapter" in path.name]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is make().__class__
    assert_close(plain(TOKENS).logits, logits)
    assert (logits - make()(TOKENS).logits).abs().max() > 0.01
    assert_close(Causal.from_pretrained(tmp_path).eval()(TOKENS)[2], values)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_close(model(TOKENS)[0], logits, 0)


def test_the_active_adapter_is_merged(tmp_path: Path) -> None:
    model = trained(tiny_gpt2)
    default = model(TOKENS)[0]
    model.pretrained_model.add_adapter("other", lora_config(init_lora_weights=False))
    model.save_merged(tmp_path / "default")
    model.pretrained_model.set_adapter("other")
    model.save_merged(tmp_path / "other")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("default", "other"))
    assert_close(first(TOKENS).logits, default)
    assert_close(second(TOKENS).logits, model(TOKENS)[0])
    assert (first(TOKENS).logits - second(TOKENS).logits).abs().max() > 0.01


def test_encoder_decoder(tmp_path: Path) -> None:
    config = lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], **LLAMA)
    model = Seq2Seq.from_pretrained(tiny_t5(), peft_config=config).eval()
    stir(model)
    model.save_merged(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    assert_close(plain(**inputs).logits, model(**inputs)[0])


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no PEFT adapter"):
        Causal.from_pretrained(tiny_gpt2()).save_merged(tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight and lm_head\.weight are tied"):
        trained(tiny_gpt2, target_modules=["wte"], **LLAMA).save_merged(tmp_path)
    model = trained(tiny_gpt2)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"attn\.c_attn is off: enable it"):
        model.save_merged(tmp_path)
    model.pretrained_model.merge_adapter()
    with pytest.raises(ValueError, match="already merged into the base weights"):
        model.save_merged(tmp_path)
    model.pretrained_model.unmerge_adapter()
    model.pretrained_model.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="merged into a quantized base without loss: save the adapter"):
        model.save_merged(tmp_path)
    assert list(tmp_path.iterdir()) == []
