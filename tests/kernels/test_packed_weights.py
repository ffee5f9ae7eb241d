"""Decoding on weights that are laid out for it."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trl.kernels import packed_weights as packing
from trl.kernels import products
from trl.kernels.packed_weights import LEAST_TOKENS, packed_weights
from trl.kernels.products import LinearForward
from trl.rollout import obstacle, sample
from trl.types import Sampling

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not products._has_onednn(), reason="torch was built without oneDNN's linear layers"),
]


def llama(dtype: torch.dtype = torch.float32, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, **sizes, **more)
    return LlamaForCausalLM(config).eval().to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=64, n_layer=2, n_head=4)).eval()


def replaced(model: torch.nn.Module) -> set[str]:
    """Names of the modules whose forward another one stands in for."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


# Keys and values of the Llama are 32 wide, which is not worth it.
PACKED = {
    llama: {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
    gpt2: {"c_attn", "c_proj", "c_fc", "lm_head"},
}


@pytest.mark.parametrize("make", PACKED)
def test_same_logits(make) -> None:
    model = make()
    words = torch.randint(80, (3, 9))
    with torch.no_grad():
        want = model(input_ids=words).logits
        with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
            assert {name.split(".")[-1] for name in replaced(model)} == PACKED[make]
            torch.testing.assert_close(model(input_ids=words).logits, want, rtol=1e-4, atol=1e-5)
    assert not replaced(model)


def test_the_weights_of_the_moment_are_packed() -> None:
    model, words = llama(), torch.randint(80, (2, 4))
    with torch.no_grad():
        with packed_weights(model, rows=2, tokens=LEAST_TOKENS):
            first = model(input_ids=words).logits
        model.lm_head.weight.mul_(2)
        with packed_weights(model, rows=2, tokens=LEAST_TOKENS):
            torch.testing.assert_close(model(input_ids=words).logits, 2 * first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mkl_is_slow", [False, True])
def test_a_single_float32_row_is_left_to_mkl(mkl_is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "prefers_onednn", lambda: mkl_is_slow)
    for rows in (1, 2):
        with packed_weights(model := llama(), rows=rows, tokens=LEAST_TOKENS):
            assert bool(replaced(model)) == (rows > 1 or mkl_is_slow)
    if products.can_be_packed(torch.zeros(64, 64, dtype=torch.bfloat16)):
        with packed_weights(model := llama(torch.bfloat16), rows=1, tokens=LEAST_TOKENS):
            assert replaced(model)


def test_too_few_tokens_and_layers_of_somebody_else() -> None:
    model = llama()
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS - 1):
        assert not replaced(model)
    theirs = model.lm_head.forward = lambda hidden: hidden
    ours = model.model.layers[0].mlp.up_proj.forward = LinearForward(
        model.model.layers[0].mlp.up_proj, transposed=False
    )
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert model.lm_head.forward is theirs
        assert model.model.layers[0].mlp.up_proj.forward is not ours
    assert model.lm_head.forward is theirs
    assert model.model.layers[0].mlp.up_proj.forward is ours
    assert replaced(model) == {"lm_head", "model.layers.0.mlp.up_proj"}


def test_rows_of_another_dtype_go_the_plain_way() -> None:
    model = llama()
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS), pytest.raises(RuntimeError, match="dtype"):
        model.lm_head(torch.zeros(1, 64, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_and_its_trial_use_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(weight: torch.Tensor, rows: int) -> torch.Tensor:
        made.append(rows)
        return products.packed(weight, rows)

    monkeypatch.setattr("trl.kernels.packed_weights.packed", counted)
    model = llama(dtype)
    if not products.can_be_packed(model.lm_head.weight):
        pytest.skip("this processor has no bfloat16 instructions")
    assert obstacle(model) is None
    assert len(made) == 11
    uniforms = torch.rand(LEAST_TOKENS, 5, dtype=torch.float64)
    made.clear()
    queries = [torch.randint(80, (n,)) for n in (1, 4, 2, 2, 3)]
    sample(model, queries, sampling=Sampling(), limits=[LEAST_TOKENS] * 5, uniforms=uniforms)
    assert made == [5] * 11


# peft asks transformers under an older name
old_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def adapted(bias: bool = False, **settings: object) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    config = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1}
    model = peft.get_peft_model(llama(attention_bias=bias), peft.LoraConfig(**(config | settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "bias" in name:
                parameter.normal_()
    return model


def joined(model: torch.nn.Module) -> int:
    """How many adapters are packed with the weights under them."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    return sum(isinstance(forward, packing._PackedLinear) and forward.up is not None for forward in forwards)


@old_name
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_alpha": 13}, {"bias": True}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"up_proj": 2}}],
)
def test_adapters_give_the_same_logits(settings: dict[str, object]) -> None:
    model = adapted(**settings)
    words = torch.randint(80, (3, 9))
    with torch.no_grad():
        want = model(input_ids=words).logits
        with model.disable_adapter():
            base = model(input_ids=words).logits
        assert not torch.allclose(want, base, atol=1e-2)
        with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
            plain = not {"use_dora", "lora_bias"} & settings.keys()
            assert joined(model) == (4 if plain else 0)
            torch.testing.assert_close(model(input_ids=words).logits, want, rtol=1e-4, atol=1e-4)
        with model.disable_adapter(), packed_weights(model, rows=3, tokens=LEAST_TOKENS):
            assert joined(model) == 0
            torch.testing.assert_close(model(input_ids=words).logits, base, rtol=1e-4, atol=1e-4)
    assert not replaced(model)


@old_name
def test_of_two_adapters_and_of_one_in_training_peft_keeps_the_sum() -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 4  # "other" is not active
    model.train()
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 0
    model.eval()
    model.base_model.set_adapter(["default", "other"])
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 2  # up_proj has one of them


def test_copies_that_would_fill_the_memory_are_not_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama()
    size = 4 * sum(p.numel() for p in model.parameters())
    assert (packing._memory() or 0) > 2**28
    monkeypatch.setattr(packing, "_memory", lambda: 4 * size)
    with caplog.at_level("INFO", logger="trl"):
        for _ in range(2):
            with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
                assert not replaced(model)
    assert len(caplog.records) == 1 and "more than an eighth of the memory" in caplog.text
    monkeypatch.setattr(packing, "_memory", lambda: 8 * size)
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert "lm_head" in replaced(model)


def test_the_memory_of_a_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = packing._memory.__wrapped__()
    assert known is not None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{known // 3}\n")
    monkeypatch.setattr(
        packing, "_limit_files", lambda: [tmp_path / "memory.max", tmp_path / "limit", tmp_path / "none"]
    )
    assert packing._memory.__wrapped__() == known // 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert packing._memory.__wrapped__() == known // 3 // 2


@old_name
def test_within_fast_linear_layers_and_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = LinearForward(module, transposed=False)
    with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 4
    with torch.autocast("cpu", torch.bfloat16), packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 0


@old_name
def test_a_hook_is_not_passed_over() -> None:
    model = adapted()
    called: list[int] = []
    inner = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    inner.register_forward_hook(lambda *args: called.append(1))
    with torch.no_grad(), packed_weights(model, rows=3, tokens=LEAST_TOKENS):
        assert joined(model) == 3
        model(input_ids=torch.randint(80, (3, 9)))
    assert called == [1]


def test_the_argument_may_be_named() -> None:
    model, rows = llama(), torch.randn(3, 64)
    with torch.no_grad():
        want = model.lm_head(rows)
        with packed_weights(model, rows=3, tokens=LEAST_TOKENS):
            torch.testing.assert_close(model.lm_head(input=rows), want, rtol=1e-4, atol=1e-5)
