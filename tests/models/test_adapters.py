"""PEFT: what is trained, what is saved, what the reference is, and the reward adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("peft")
import transformers

from tests.helpers import assert_close, tiny_gpt2, tiny_t5
from tests.models.lora import lora, lora_config, stir
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.models import adapter_starts_at_zero, create_reference_model, reference_mode

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
HEAD = {"v_head.summary.weight", "v_head.summary.bias"}


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def reward_folder(base: Path, tmp_path: Path) -> Path:
    """A trained LoRA classifier with two labels."""
    trunk = transformers.GPT2ForSequenceClassification(tiny_gpt2(num_labels=2).config)
    trunk.transformer.load_state_dict(tiny_gpt2().transformer.state_dict())
    model = lora(trunk, task_type="SEQ_CLS")
    stir(model, seed=7)
    model.save_pretrained(tmp_path / "reward", save_embedding_layers=False)
    return tmp_path / "reward"


# -- training ----------------------------------------------------------------------------------------------------


def test_config_makes_a_fresh_adapter_and_trains_it_and_the_head_alone(base: Path) -> None:
    for model in (
        Causal.from_pretrained(base, peft_config=lora_config(r=16)),
        Causal.from_pretrained(tiny_gpt2(), peft_config=lora_config(r=16)),
        Causal.from_pretrained(lora(tiny_gpt2(), r=16)),
    ):
        assert model.is_peft_model
        assert trained(model) > HEAD
        assert all("lora_" in name for name in trained(model) - HEAD)
        assert model.pretrained_model.active_peft_config.r == 16
        assert_close(model.eval()(TOKENS)[0], tiny_gpt2()(TOKENS).logits)


def test_encoder_decoder() -> None:
    config = lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], fan_in_fan_out=False)
    model = Seq2Seq.from_pretrained(tiny_t5(), peft_config=config).eval()
    plain = tiny_t5()
    assert_close(model(TOKENS, decoder_input_ids=TOKENS)[0], plain(input_ids=TOKENS, decoder_input_ids=TOKENS).logits)
    assert torch.equal(
        model.generate(TOKENS, max_new_tokens=3, do_sample=False),
        plain.generate(TOKENS, max_new_tokens=3, do_sample=False),
    )


def test_generate_takes_tokens_by_position() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2())).eval()
    expected = tiny_gpt2().generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3, do_sample=False), expected)


def test_gradient_checkpointing_reaches_the_adapter() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2())).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(TOKENS, use_cache=False)[0].logsumexp(-1).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    model.gradient_checkpointing_disable()


# -- files -------------------------------------------------------------------------------------------------------


def test_save_holds_the_adapter_and_the_head(base: Path, tmp_path: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config()).eval()
    stir(model)
    model.save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "v_head.safetensors")) == HEAD
    assert all("lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert not (tmp_path / "out" / "model.safetensors").exists()

    loaded = Causal.from_pretrained(tmp_path / "out").eval()
    assert_close(loaded(TOKENS)[0], model(TOKENS)[0])
    assert_close(loaded(TOKENS)[2], model(TOKENS)[2])


def test_loaded_adapter_trains_if_asked(base: Path, tmp_path: Path) -> None:
    Causal.from_pretrained(base, peft_config=lora_config()).save_pretrained(tmp_path / "out")
    assert trained(Causal.from_pretrained(tmp_path / "out")) == HEAD
    more = trained(Causal.from_pretrained(tmp_path / "out", is_trainable=True))
    assert more > HEAD
    assert all("lora_" in name for name in more - HEAD)


def test_folder_written_by_peft_itself_gets_a_fresh_head(base: Path, tmp_path: Path) -> None:
    model = lora(transformers.AutoModelForCausalLM.from_pretrained(base)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "out", save_embedding_layers=False)
    loaded = Causal.from_pretrained(tmp_path / "out").eval()
    assert loaded.is_peft_model
    assert_close(loaded(TOKENS)[0], model(TOKENS).logits)


def test_state_of_a_training_process_is_what_is_saved(base: Path, tmp_path: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config()).eval()
    other = Causal.from_pretrained(base, peft_config=lora_config()).eval()
    stir(other)
    model.save_pretrained(tmp_path / "out", state_dict=other.state_dict())
    assert_close(Causal.from_pretrained(tmp_path / "out").eval()(TOKENS)[0], other(TOKENS)[0])


# -- what is refused ---------------------------------------------------------------------------------------------


def test_bad_adapters(base: Path, tmp_path: Path) -> None:
    import peft

    with pytest.raises(ValueError, match=r"peft\.PeftConfig, not dict"):
        Causal.from_pretrained(base, peft_config={"r": 4})
    with pytest.raises(ValueError, match="second adapter"):
        Causal.from_pretrained(lora(tiny_gpt2()), peft_config=lora_config())
    with pytest.raises(ValueError, match=r"PROMPT_TUNING.*virtual tokens"):
        Causal.from_pretrained(base, peft_config=peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"contains no adapter_model\.safetensors"):
        Causal.from_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="has no base_model_name_or_path"):
        Causal.from_pretrained(tmp_path)


# -- the reference -------------------------------------------------------------------------------------------------


def test_reference_mode_is_the_base_model_and_restores_everything() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2())).eval()
    stir(model)
    for name, parameter in model.named_parameters():  # a choice that peft's switches would undo
        parameter.requires_grad_("lora_A" in name or "v_head" in name)
    before, with_adapter = trained(model), model(TOKENS)[0]
    with reference_mode(model) as reference:
        assert_close(reference(TOKENS)[0], tiny_gpt2()(TOKENS).logits)
        with model.disable_adapter():
            pass
        assert_close(reference(TOKENS)[0], tiny_gpt2()(TOKENS).logits)
    assert_close(model(TOKENS)[0], with_adapter, 0)
    assert (with_adapter - tiny_gpt2()(TOKENS).logits).abs().max() > 0.01
    assert trained(model) == before


def test_reference_mode_is_left_after_an_error() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2())).eval()
    stir(model)
    with_adapter = model(TOKENS)[0]
    with pytest.raises(RuntimeError, match="inside"), reference_mode(model):
        raise RuntimeError("inside")
    assert_close(model(TOKENS)[0], with_adapter, 0)


@pytest.mark.parametrize("function", [adapter_starts_at_zero, lambda m: reference_mode(m).__enter__()])
def test_without_an_adapter_there_is_nothing_to_turn_off(function: Any) -> None:
    with pytest.raises(ValueError, match="create_reference_model"):
        function(Causal.from_pretrained(tiny_gpt2()))


def test_whether_an_adapter_starts_at_zero() -> None:
    import peft

    assert adapter_starts_at_zero(lora(tiny_gpt2()))
    assert adapter_starts_at_zero(Causal.from_pretrained(lora(tiny_gpt2(), init_lora_weights="gaussian")))
    assert adapter_starts_at_zero(lora(tiny_gpt2(), target_modules=["wte"], fan_in_fan_out=False))

    trained_before = lora(tiny_gpt2())
    stir(trained_before)
    assert not adapter_starts_at_zero(trained_before)
    assert not adapter_starts_at_zero(lora(tiny_gpt2(), init_lora_weights=False))
    assert not adapter_starts_at_zero(lora(tiny_gpt2(), init_lora_weights="pissa"))  # changes the base's weights
    assert not adapter_starts_at_zero(lora(tiny_gpt2(), modules_to_save=["ln_f"]))
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    assert not adapter_starts_at_zero(Causal.from_pretrained(tiny_gpt2(), peft_config=ia3))


def test_frozen_copy_keeps_a_trained_adapter() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2())).train()
    stir(model)
    copied = create_reference_model(model)
    expected = model.eval()(TOKENS)[0].detach()
    assert model.training is False
    assert not copied.training
    assert not trained(copied)
    stir(model, seed=1)
    assert_close(copied(TOKENS)[0], expected, 0)


# -- the reward adapter --------------------------------------------------------------------------------------------


def test_reward_adapter_scores_as_the_classifier_did(base: Path, reward_folder: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config(r=16), reward_adapter=reward_folder)
    stir(model.pretrained_model.base_model.model.transformer.h[0], seed=3)  # whatever the policy learns
    policy = model.eval()(TOKENS)[0]
    model.train()
    scores = model.compute_reward_score(TOKENS, torch.ones_like(TOKENS))
    assert scores.shape == (2, 4, 2)
    assert model.training

    weights = load_file(reward_folder / "adapter_model.safetensors")
    classifier = transformers.GPT2ForSequenceClassification(tiny_gpt2(num_labels=2).config)
    classifier.transformer.load_state_dict(tiny_gpt2().transformer.state_dict())
    for layer, block in enumerate(classifier.transformer.h):
        stem = f"base_model.model.transformer.h.{layer}.attn.c_attn"
        product = weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"]
        block.attn.c_attn.weight.data += product.T * 8 / 4  # lora_alpha / r
    hidden = classifier.eval().transformer(TOKENS).last_hidden_state
    assert_close(scores, hidden @ weights["base_model.model.score.weight"].T)
    assert_close(model.eval()(TOKENS)[0], policy, 0)


def test_reward_adapter_is_frozen_and_named(base: Path, reward_folder: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config(), reward_adapter=str(reward_folder))
    reward = [(name, p) for name, p in model.named_parameters() if "reward" in name]
    assert len(reward) == 5  # A and B in two layers, and the score head
    assert not any(p.requires_grad for _, p in reward)
    before = trained(model)
    model.compute_reward_score(TOKENS)
    logits, _, values = model(TOKENS)
    (logits.logsumexp(-1).sum() + values.sum()).backward()
    assert all(p.grad is None for _, p in reward)
    assert trained(model) == before
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad)


def test_reward_adapter_is_not_saved_with_the_policy(base: Path, reward_folder: Path, tmp_path: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config(), reward_adapter=reward_folder)
    assert not [name for name in model.state_dict() if "reward_score" in name]
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "out")
    assert not [path.name for path in (tmp_path / "out").iterdir() if "reward" in path.name]
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "reward" in name]


def test_bad_reward_adapters(base: Path, reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass peft_config as well"):
        Causal.from_pretrained(base, reward_adapter=reward_folder)
    model = Causal.from_pretrained(base, peft_config=lora_config())
    with pytest.raises(ValueError, match="no reward adapter"):
        model.compute_reward_score(TOKENS)
    with pytest.raises(ValueError, match="'judge' must contain 'reward'"):
        model.add_and_load_reward_modeling_adapter(reward_folder, "judge")
    model.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="no score head"):
        model.add_and_load_reward_modeling_adapter(tmp_path / "policy")
    model.add_and_load_reward_modeling_adapter(reward_folder)
    with pytest.raises(ValueError, match="already has an adapter"):
        model.add_and_load_reward_modeling_adapter(reward_folder)
    with pytest.raises(ValueError, match="'other' must be one of"):
        model.compute_reward_score(TOKENS, ppo_adapter_name="other")


def flags(model: torch.nn.Module) -> list[Any]:
    """Everything that switching adapters may leave changed."""
    layers = [m for m in model.modules() if type(m).__module__.startswith("peft.tuners.lora.layer")]
    return [
        trained(model),
        [module.training for module in model.modules()],
        [(layer.active_adapters, layer.disable_adapters) for layer in layers],
        model.pretrained_model.active_adapter,  # type: ignore[union-attr]
        model.pretrained_model.active_adapters,  # type: ignore[union-attr]
    ]


def test_scoring_leaves_everything_as_it_was(base: Path, reward_folder: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config(), reward_adapter=reward_folder)
    expected = model.compute_reward_score(TOKENS)
    model.pretrained_model.add_adapter("other", lora_config(r=2))
    model.pretrained_model.set_adapter("other")
    for name, parameter in model.named_parameters():  # flags that peft would set anew
        parameter.requires_grad_("lora_A.default" in name)
    model.train()
    model.pretrained_model.base_model.model.transformer.h[0].eval()
    before = flags(model)
    assert_close(model.compute_reward_score(TOKENS), expected, 0)
    assert flags(model) == before
    with model.disable_adapter():
        off = flags(model)
        assert_close(model.compute_reward_score(TOKENS), expected, 0)
        assert flags(model) == off
    assert flags(model) == before
    with pytest.raises(IndexError):
        model.compute_reward_score(TOKENS + 1000)
    assert flags(model) == before
    model.pretrained_model.set_adapter("default")
    model.compute_reward_score(TOKENS, ppo_adapter_name="other")
    assert model.pretrained_model.active_adapters == ["other"]


def test_loading_a_reward_adapter_leaves_a_training_model_in_training(base: Path, reward_folder: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config()).train()
    before = flags(model)
    model.add_and_load_reward_modeling_adapter(reward_folder)
    assert flags(model)[0] == before[0]
    assert model.training and model.pretrained_model.base_model.model.transformer.h[0].attn.training


def test_scores_do_not_depend_on_the_padding_side(base: Path, reward_folder: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config(), reward_adapter=reward_folder)
    alone = model.compute_reward_score(TOKENS[:1])
    for columns in (slice(0, 4), slice(2, 6)):
        tokens, mask = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64)
        tokens[:, columns], mask[:, columns] = TOKENS[:1], 1
        assert_close(model.compute_reward_score(tokens, mask)[:, columns], alone)


def test_an_adapter_of_another_architecture_is_refused(base: Path, tmp_path: Path) -> None:
    from tests.helpers import tiny_llama

    classifier = transformers.LlamaForSequenceClassification(tiny_llama(num_labels=1).config)
    other = lora(classifier, task_type="SEQ_CLS", target_modules=["q_proj"], fan_in_fan_out=False)
    other.save_pretrained(tmp_path / "llama", save_embedding_layers=False)
    model = Causal.from_pretrained(base, peft_config=lora_config())
    with pytest.raises(ValueError, match=r"Target modules|does not fit"):
        model.add_and_load_reward_modeling_adapter(tmp_path / "llama")
    wide = transformers.GPT2ForSequenceClassification(tiny_gpt2(num_labels=1, n_embd=32).config)
    lora(wide, task_type="SEQ_CLS").save_pretrained(tmp_path / "wide", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"reads hidden states of size 32; the model's have 16"):
        model.add_and_load_reward_modeling_adapter(tmp_path / "wide")
    assert list(model.pretrained_model.peft_config) == ["default"]


# -- several adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def sft_folder(base: Path, tmp_path: Path) -> Path:
    """A trained LoRA policy, as an SFT stage leaves it."""
    model = lora(transformers.AutoModelForCausalLM.from_pretrained(base))
    stir(model, seed=11)
    model.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    return tmp_path / "sft"


def test_reference_adapter_is_the_policy_it_started_from(sft_folder: Path, tmp_path: Path) -> None:
    model = Causal.from_pretrained(sft_folder, is_trainable=True, reference_adapter=sft_folder).eval()
    start = model(TOKENS)[0].detach()
    before = flags(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(1.0)
    assert (model(TOKENS)[0] - start).abs().max() > 0.01
    with reference_mode(model) as reference:
        assert_close(reference(TOKENS)[0], start)
    with model.disable_adapter():
        assert_close(model(TOKENS)[0], tiny_gpt2()(TOKENS).logits)
    assert flags(model) == before
    assert not any("reference" in name for name in trained(model))
    model.save_pretrained(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_policy_reference_and_reward_take_one_base(sft_folder: Path, reward_folder: Path) -> None:
    """At most 1.4 times the bytes of the base with one adapter."""
    one = Causal.from_pretrained(sft_folder, is_trainable=True)
    many = Causal.from_pretrained(
        sft_folder, is_trainable=True, reward_adapter=reward_folder, reference_adapter=sft_folder
    )

    def size(model: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in model.parameters())

    adapter = sum(tensor.nbytes for tensor in load_file(sft_folder / "adapter_model.safetensors").values())
    reward = sum(tensor.nbytes for tensor in load_file(reward_folder / "adapter_model.safetensors").values())
    assert size(many) == size(one) + adapter + reward
    assert size(many) <= 1.4 * size(one)


def test_bad_reference_adapters(base: Path, sft_folder: Path) -> None:
    with pytest.raises(ValueError, match="pass peft_config as well"):
        Causal.from_pretrained(base, reference_adapter=sft_folder)
    model = Causal.from_pretrained(sft_folder, reference_adapter=sft_folder, reference_adapter_name="sft")
    with pytest.raises(ValueError, match="already has the reference adapter 'sft'"):
        model.add_reference_adapter(sft_folder)
    model.pretrained_model.merge_adapter()
    with pytest.raises(ValueError, match=r"'sft' cannot be used while another is merged.*unmerge_adapter"):
        reference_mode(model).__enter__()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_policy_adapter_of_another_name_is_saved_and_loaded(base: Path, tmp_path: Path) -> None:
    import peft

    inner = peft.get_peft_model(tiny_gpt2(), lora_config(), adapter_name="policy")
    inner.peft_config["policy"].base_model_name_or_path = str(base)
    model = Causal.from_pretrained(inner).eval()
    stir(model)
    model.save_pretrained(tmp_path / "out")
    loaded = Causal.from_pretrained(tmp_path / "out" / "policy").eval()
    assert_close(loaded(TOKENS)[0], model(TOKENS)[0])
    assert_close(loaded(TOKENS)[2], model(TOKENS)[2])


def test_scoring_never_copies_the_language_model_head(base: Path, reward_folder: Path) -> None:
    """Torch's product of a slice of hidden states repeats the head's weights for every row."""
    model = Causal.from_pretrained(base, peft_config=lora_config(), reward_adapter=reward_folder)
    rows, (vocabulary, width) = len(TOKENS), model.pretrained_model.get_output_embeddings().weight.shape
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            sizes.extend(arg.numel() for arg in args if isinstance(arg, torch.Tensor))
            return func(*args, **kwargs or {})

    with Sizes():
        model.compute_reward_score(TOKENS, torch.ones_like(TOKENS))
    assert max(sizes) < rows * vocabulary * width
