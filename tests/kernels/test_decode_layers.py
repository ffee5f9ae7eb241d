"""Decoder layers with few operations: the numbers of the model's own, for each make and under adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.kernels.test_packed_weights import old_name, replaced
from trl.kernels import products
from trl.kernels.decode_attention import decoding
from trl.kernels.decode_layers import _GPT2, QuickLayer, _Gated, quick_make
from trl.kernels.packed_weights import LEAST_TOKENS, packed_weights
from trl.rollout import self_check

pytestmark = pytest.mark.skipif(not products._has_onednn(), reason="torch was built without oneDNN's linear layers")

SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**more: object) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | more)))


def mistral() -> torch.nn.Module:
    return MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=4))


def qwen() -> torch.nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def gpt2(**more: object) -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4, **more))


def made(make: Callable[..., torch.nn.Module], dtype: torch.dtype = torch.float32, **more: object) -> torch.nn.Module:
    """A model whose norms and biases are not what they begin as."""
    torch.manual_seed(0)
    model = make(**more).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass of a layer was made with few operations."""
    seen: list[bool] = []
    for kind in (_Gated, _GPT2):

        def watched(self: QuickLayer, *args: object, _plain=kind.pass_through, **kwargs: object) -> object:
            found = _plain(self, *args, **kwargs)
            seen.append(found is not None)
            return found

        monkeypatch.setattr(kind, "pass_through", watched)
    return seen


@pytest.mark.parametrize("make", [llama, mistral, qwen, gpt2])
def test_decoding_gives_the_numbers_of_plain_passes(make: Callable[..., torch.nn.Module], passes: list[bool]) -> None:
    model = made(make)
    assert self_check._gap(model) < 1e-5
    assert passes == [True] * len(passes) and len(passes) == 8  # a prefill and three tokens, in two layers
    assert not replaced(model)


@pytest.mark.parametrize("make", [llama, qwen, gpt2])
def test_in_bfloat16_they_are_as_near_as_rounding_lets_them(make: Callable[..., torch.nn.Module]) -> None:
    model = made(make, torch.bfloat16)
    if not products.can_be_packed(model.get_output_embeddings().weight):
        pytest.skip("this processor has no bfloat16 instructions")
    plain = made(make, torch.bfloat16)
    for layer in plain.modules():
        layer.register_forward_hook(lambda *args: None)  # a layer that somebody watches is run as it is
    assert quick_make(next(m for m in plain.modules() if type(m).__name__.endswith(("DecoderLayer", "Block")))) is None
    assert self_check._gap(model) < max(2 * self_check._gap(plain), 0.02)


@old_name
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]], ids=len
)
def test_under_adapters(targets: list[str], passes: list[bool]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets, lora_alpha=3)
    model = peft.get_peft_model(made(llama, attention_bias=True), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert self_check._gap(model) < 1e-5
    assert passes == [True] * 8
    with model.disable_adapter():
        assert self_check._gap(model) < 1e-5
        assert len(passes) == 8  # peft knows best


def test_what_is_not_as_it_was_made_runs_as_it_is() -> None:
    def known(model: torch.nn.Module) -> list[bool]:
        layers = getattr(model.get_decoder(), "layers", None) or model.get_decoder().h
        return [quick_make(layer) is not None for layer in layers]

    assert known(made(llama)) == [True, True]
    assert known(made(gpt2)) == [True, True]
    assert known(made(llama, hidden_act="relu")) == [False, False]
    assert known(made(gpt2, activation_function="relu")) == [False, False]
    assert known(made(gpt2, add_cross_attention=True)) == [False, False]
    model = made(llama)
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: None)
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward
    assert known(model) == [False, False]
    model = made(llama)
    model.config._attn_implementation = "eager"
    assert known(model) == [False, False]
    model = made(llama)
    model.model.layers[0].forward = model.model.layers[0].forward
    model.model.layers[1].to(torch.float64)
    assert known(model) == [False, False]


def test_a_part_of_another_class_or_with_a_hook_runs_as_it_is() -> None:
    class Louder(LlamaAttention):
        def forward(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
            seen, weights = super().forward(*args, **kwargs)
            return 1.25 * seen, weights

    def change(model: torch.nn.Module, what: str) -> None:
        for layer in model.model.layers:
            if what == "attention":
                layer.self_attn.__class__ = Louder
            elif what == "norm":
                layer.input_layernorm = torch.nn.RMSNorm(64)
            else:
                layer.mlp.act_fn.register_forward_hook(lambda *args: calls.append(1))

    calls: list[int] = []
    for what in ("attention", "norm", "hook"):
        model = made(llama)
        change(model, what)
        assert [quick_make(layer) for layer in model.model.layers] == [None, None]
        assert self_check.obstacle(model) is None
    assert calls
    norms = made(gpt2)
    norms.transformer.h[0].ln_1 = torch.nn.RMSNorm(64)
    assert [quick_make(layer) is None for layer in norms.transformer.h] == [True, False]


@old_name
def test_under_adapters_on_norms_and_on_bare_parameters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=[], target_parameters=["q_proj.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuning = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
        norms = peft.get_peft_model(made(llama), tuning).eval()
        bare = peft.get_peft_model(made(llama), config).eval()
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert self_check.obstacle(norms) is None
    assert self_check._gap(bare) < 1e-5


def as_before_5_1(self: object, hidden: object, past_key_values=None, cache_position=None, attention_mask=None) -> None:
    """The signature of GPT-2's block in transformers 5.0."""


def as_in_5_24(self: object, hidden: object, cache=None, attention_mask=None) -> None:
    """And in 5.24."""


@pytest.mark.parametrize(("signature", "between"), [(as_before_5_1, [None]), (as_in_5_24, [])], ids=["5.0", "5.24"])
def test_arguments_are_known_by_the_names_that_the_layer_has_for_them(
    signature: Callable[..., None], between: list[None], passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, hidden = made(gpt2), torch.randn(2, 1, 64)
    (layer, _), first = model.transformer.h, torch.randn(2, 3, 64)
    mask = torch.tensor([[True, True, True, True], [False, True, True, True]])[:, None, None]
    with torch.no_grad(), decoding(model):
        both = torch.cat([first, hidden], dim=1)
        seen = mask & torch.ones(4, 4, dtype=torch.bool).tril()
        want = layer(both, None, attention_mask=seen)[:, -1:]  # every release takes the cache first
        monkeypatch.setattr(type(layer), "forward", signature)
        quick, cache = _GPT2(layer, rows=2), DynamicCache(config=model.config)
        quick(first, cache, *between, seen[:, :, :3, :3])
        torch.testing.assert_close(quick(hidden, cache, *between, mask), want, rtol=1e-4, atol=1e-5)
    assert passes == [True, True]


def test_passes_that_they_are_not_for_are_the_models_own(passes: list[bool]) -> None:
    model, words = made(llama), torch.randint(80, (3, 9))
    with torch.no_grad():
        want = model(input_ids=words, use_cache=False).logits
        with decoding(model), packed_weights(model, rows=3, tokens=LEAST_TOKENS):
            torch.testing.assert_close(model(input_ids=words, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)
            assert passes == [False, False]
            model.train()
            torch.testing.assert_close(model(input_ids=words).logits, want, rtol=1e-4, atol=1e-5)
            assert passes == [False, False]  # not asked
