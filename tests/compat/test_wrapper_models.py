"""What scripts written for TRL 0.4–0.11 do with value-head models, held to what they got."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    create_reference_model,
)

IDS = torch.tensor([[4, 5, 6], [7, 8, 9]])
BUILDS = pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5])
ASKS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft does


def kind(build: Callable[..., Any]) -> type[PreTrainedModelWrapper]:
    return AutoModelForSeq2SeqLMWithValueHead if build is tiny_t5 else AutoModelForCausalLMWithValueHead


def wrap(build: Callable[..., Any] = tiny_gpt2, **kwargs: Any) -> PreTrainedModelWrapper:
    return kind(build).from_pretrained(build(), **kwargs).eval()


def inputs(build: Callable[..., Any] = tiny_gpt2) -> dict[str, Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :2].contiguous()} if build is tiny_t5 else {})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestMaking:
    @BUILDS
    def test_from_an_object_a_folder_and_a_plain_constructor(self, build: Callable[..., Any], tmp_path: Path) -> None:
        plain = build()
        plain.save_pretrained(tmp_path)
        for model in (
            kind(build).from_pretrained(plain),
            kind(build).from_pretrained(str(tmp_path)),
            kind(build).from_pretrained(tmp_path),
            kind(build)(plain),
        ):
            assert isinstance(model, kind(build))
            assert type(model.pretrained_model) is type(plain)
            for name, tensor in plain.state_dict().items():
                assert torch.equal(model.pretrained_model.state_dict()[name], tensor), name

    def test_arguments_go_to_the_head_and_the_rest_to_transformers(self, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            str(tmp_path),
            summary_dropout_prob=0.25,
            v_head_init_strategy="normal",
            v_head_initializer_range=0.0,
            torch_dtype=torch.bfloat16,
            resid_pdrop=0.5,
        )
        assert model.v_head.dropout.p == 0.25
        assert bool((model.v_head.summary.weight == 0).all())
        assert model.pretrained_model.dtype == torch.bfloat16
        assert model.pretrained_model.config.resid_pdrop == 0.5

    def test_weights_load_in_float32_unless_told_otherwise(self, tmp_path: Path) -> None:
        tiny_gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
        assert AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).pretrained_model.dtype == torch.float32

    @BUILDS
    def test_value_head(self, build: Callable[..., Any]) -> None:
        summary = wrap(build).v_head.summary
        assert isinstance(summary, nn.Linear)
        assert (summary.in_features, summary.out_features) == (16, 1)
        assert 0 < float(summary.weight.detach().abs().max()) < 0.5
        assert bool((summary.bias != 0).all())

    def test_wide_start(self) -> None:
        wide = wrap(v_head_init_strategy="normal", v_head_initializer_range=2.0).v_head.summary
        assert float(wide.weight.detach().std()) > 1.0
        assert bool((wide.bias == 0).all())

    def test_dropout_of_the_config(self) -> None:
        plain = tiny_gpt2()
        plain.config.summary_dropout_prob = 0.4
        assert AutoModelForCausalLMWithValueHead.from_pretrained(plain).v_head.dropout.p == 0.4
        assert (
            AutoModelForCausalLMWithValueHead.from_pretrained(plain, summary_dropout_prob=0.1).v_head.dropout.p == 0.1
        )

    def test_attributes(self) -> None:
        model = wrap()
        assert model.is_peft_model is False
        assert model.is_sequential_parallel is False
        model.gradient_checkpointing_enable()
        model.gradient_checkpointing_disable()

    @pytest.mark.parametrize("seq2seq", [False, True])
    def test_no_language_model_head(self, seq2seq: bool) -> None:
        if seq2seq:
            headless, wrapper = tiny_t5().encoder, AutoModelForSeq2SeqLMWithValueHead
        else:
            headless, wrapper = tiny_gpt2().transformer, AutoModelForCausalLMWithValueHead
        with pytest.raises(ValueError):
            wrapper.from_pretrained(headless)


class TestUsing:
    @BUILDS
    def test_forward_returns_logits_loss_and_values(self, build: Callable[..., Any]) -> None:
        model = wrap(build)
        result = model(**inputs(build))
        assert type(result) is tuple
        logits, loss, values = result
        length = inputs(build).get("decoder_input_ids", IDS).shape[1]
        assert logits.shape == (2, length, 61)
        assert values.shape == (2, length)
        assert loss is None
        assert_close(logits, model.pretrained_model(**inputs(build)).logits)
        assert model(**inputs(build), labels=inputs(build).get("decoder_input_ids", IDS))[1].dim() == 0

    @BUILDS
    def test_logits_are_float32_in_half_precision_too(self, build: Callable[..., Any]) -> None:
        model = wrap(build)
        model.pretrained_model.to(torch.bfloat16)
        logits, _, values = model(**inputs(build))
        assert logits.dtype == values.dtype == torch.float32

    def test_values_are_the_heads(self) -> None:
        model = wrap()
        hidden = model.pretrained_model.transformer(input_ids=IDS).last_hidden_state
        assert_close(model(input_ids=IDS)[2], model.v_head.summary(hidden).squeeze(-1))

    @BUILDS
    def test_generate_passes_through(self, build: Callable[..., Any]) -> None:
        model = wrap(build)
        settings = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
        expected = model.pretrained_model.generate(input_ids=IDS, **settings)
        assert model.generate(IDS, **settings).tolist() == expected.tolist()
        assert model.generate(input_ids=IDS, **settings).tolist() == expected.tolist()


class TestSaving:
    @BUILDS
    def test_names(self, build: Callable[..., Any]) -> None:
        model, head = wrap(build), {"v_head.summary.weight", "v_head.summary.bias"}
        assert set(model.state_dict()) == set(build().state_dict()) | head
        names = {name for name, _ in model.named_parameters()}
        assert names == {f"pretrained_model.{name}" for name, _ in build().named_parameters()} | head

    @BUILDS
    @pytest.mark.parametrize("shard", [None, "4KB"])
    def test_round_trip(self, build: Callable[..., Any], shard: str | None, tmp_path: Path) -> None:
        model = wrap(build)
        model.save_pretrained(str(tmp_path), **({} if shard is None else {"max_shard_size": shard}))
        if shard is not None:
            assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert same(kind(build).from_pretrained(str(tmp_path)).state_dict(), model.state_dict())
        plain, report = model.transformers_parent_class.from_pretrained(str(tmp_path), output_loading_info=True)
        assert not report["missing_keys"]
        assert same(plain.state_dict(), model.pretrained_model.state_dict())

    def test_state_dict_loads_into_another(self) -> None:
        model, other = wrap(), AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=1))
        assert not same(model.state_dict(), other.state_dict())
        other.load_state_dict(model.state_dict())
        assert same(model.state_dict(), other.state_dict())


@ASKS
class TestPeft:
    @pytest.fixture
    def peft(self) -> Any:
        return pytest.importorskip("peft")

    def lora(self, peft: Any, task: str = "CAUSAL_LM", **kwargs: Any) -> Any:
        return peft.LoraConfig(task_type=task, r=16, target_modules=["c_attn"], fan_in_fan_out=True, **kwargs)

    def test_adapter_and_head_are_what_trains(self, peft: Any) -> None:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=self.lora(peft))
        assert model.is_peft_model is True
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or "v_head." in name}
        # A and B of rank 16 for each of two layers (16 inputs, 3 x 16 outputs); a weight per hidden unit and a bias.
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == 2 * 16 * (16 + 48) + 16 + 1

    def test_from_a_peft_model(self, peft: Any) -> None:
        adapted = peft.get_peft_model(tiny_gpt2(), self.lora(peft))
        model = AutoModelForCausalLMWithValueHead.from_pretrained(adapted)
        assert model.is_peft_model is True
        assert model.pretrained_model is adapted

    def test_saves_the_adapter_and_the_head_alone(self, peft: Any, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "base")
        config = self.lora(peft, init_lora_weights=False)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=config)
        model.save_pretrained(str(tmp_path / "run"))
        assert (tmp_path / "run" / "adapter_config.json").exists()
        assert not list((tmp_path / "run").glob("model*.safetensors"))
        again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "run"), is_trainable=True)
        assert again.is_peft_model is True
        assert same(again.state_dict(), model.state_dict())
        assert any("lora_" in name for name, p in again.named_parameters() if p.requires_grad)
        frozen = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "run"))
        assert not any("lora_" in name for name, p in frozen.named_parameters() if p.requires_grad)

    def test_a_plain_adapter_folder_gets_a_fresh_head(self, peft: Any, tmp_path: Path) -> None:
        tiny_gpt2().save_pretrained(tmp_path / "base")
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
        peft.get_peft_model(base, self.lora(peft, init_lora_weights=False)).save_pretrained(str(tmp_path / "adapter"))
        model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"))
        assert model.is_peft_model is True
        assert model(input_ids=IDS)[2].shape == (2, 3)

    def test_reward_adapter(self, peft: Any, tmp_path: Path) -> None:
        from transformers import AutoModelForSequenceClassification

        tiny_gpt2().save_pretrained(tmp_path / "base")
        classifier = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"), num_labels=1)
        scorer = peft.get_peft_model(classifier, self.lora(peft, task="SEQ_CLS", init_lora_weights=False)).eval()
        scorer.save_pretrained(str(tmp_path / "reward"))
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            str(tmp_path / "base"), peft_config=self.lora(peft), reward_adapter=str(tmp_path / "reward")
        )
        mask = torch.ones_like(IDS)
        scores = model.compute_reward_score(IDS, attention_mask=mask)
        assert scores.shape == (2, 3, 1)
        with torch.no_grad():
            expected = scorer(input_ids=IDS, attention_mask=mask).logits  # of the last token
        assert_close(scores[:, -1], expected)

        logits, _, values = model(input_ids=IDS, attention_mask=mask)
        (logits.sum() + values.sum()).backward()
        for name, parameter in model.named_parameters():
            if "reward" in name:
                assert not parameter.requires_grad
                assert parameter.grad is None
        assert any("reward" in name and "lora_" in name for name, _ in model.named_parameters())
        assert any("lora_" in name and p.grad is not None for name, p in model.named_parameters())


class TestReferenceModel:
    @BUILDS
    def test_a_frozen_copy(self, build: Callable[..., Any]) -> None:
        model = wrap(build)
        reference = create_reference_model(model)
        assert type(reference) is type(model)
        assert same(reference.state_dict(), model.state_dict())
        assert not any(p.requires_grad for p in reference.parameters())
        assert all(p.requires_grad for p in model.parameters())
        assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in reference.parameters())
        assert not reference.training

    def test_shared_layers_are_frozen_in_the_active_model(self) -> None:
        model = wrap()
        reference = create_reference_model(model, num_shared_layers=1)
        for name, parameter in model.named_parameters():
            shared = any(part in name for part in (".wte.", ".wpe.", ".h.0."))
            assert parameter.requires_grad is not shared, name
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        trunks = model.pretrained_model.transformer, reference.pretrained_model.transformer
        assert torch.equal(*(trunk.h[0].attn.c_attn.weight for trunk in trunks))
        assert not torch.equal(*(trunk.h[1].attn.c_attn.weight for trunk in trunks))

    def test_pattern(self) -> None:
        model = wrap()
        create_reference_model(model, num_shared_layers=2, pattern="transformer.h.{layer}")
        assert not model.pretrained_model.transformer.h[1].attn.c_attn.weight.requires_grad
        with pytest.raises(ValueError, match="pattern"):
            create_reference_model(wrap(), num_shared_layers=1, pattern="encoder.block.{layer}")

    def test_more_layers_than_there_are(self) -> None:
        with pytest.raises(ValueError, match="3"):
            create_reference_model(wrap(), num_shared_layers=3)
