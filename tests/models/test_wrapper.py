"""The value-head models as TRL 0.4's users know them: arguments, attributes, tuple, keys, files."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5, with_cache_called
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.models import PreTrainedModelWrapper

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MAKERS = [(Causal, tiny_gpt2), (Causal, tiny_llama), (Seq2Seq, tiny_t5)]


def inputs(model: PreTrainedModelWrapper) -> dict[str, torch.Tensor]:
    """Encoder-decoders read the tokens twice."""
    return {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if model.is_encoder_decoder else {})


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_gpt2().save_pretrained(folder)
    return folder


# -- what from_pretrained takes --------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_object_and_folder_give_the_same_model(cls: Any, make: Any, tmp_path: Path) -> None:
    trunk = make()
    trunk.save_pretrained(tmp_path)
    for model in (cls.from_pretrained(trunk), cls.from_pretrained(str(tmp_path)), cls.from_pretrained(tmp_path)):
        model.eval()
        kwargs = inputs(model)
        logits, loss, values = model(**kwargs)
        assert loss is None
        assert values.shape == TOKENS.shape
        assert_close(logits, trunk(**kwargs).logits)


def test_value_head_arguments_go_to_the_head_and_others_to_transformers(gpt2_folder: Path) -> None:
    model = Causal.from_pretrained(
        gpt2_folder,
        summary_dropout_prob=0.25,
        v_head_init_strategy="normal",
        v_head_initializer_range=0.0,
        attn_implementation="eager",
        resid_pdrop=0.5,
    )
    assert model.v_head.dropout.p == 0.25
    assert not model.v_head.summary.weight.any()
    assert not model.v_head.summary.bias.any()
    assert model.config._attn_implementation == "eager"
    assert model.config.resid_pdrop == 0.5


def test_dropout_of_the_head_from_the_configuration() -> None:
    trunk = tiny_gpt2()
    trunk.config.summary_dropout_prob = 0.375
    assert Causal.from_pretrained(trunk).v_head.dropout.p == 0.375


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
def test_dtype_under_both_names(gpt2_folder: Path, keyword: str) -> None:
    model = Causal.from_pretrained(gpt2_folder, **{keyword: torch.bfloat16})
    assert model.dtype == torch.bfloat16
    assert model.v_head.summary.weight.dtype == torch.float32
    logits, _, values = model(TOKENS)
    assert logits.dtype == values.dtype == torch.float32
    assert model(TOKENS, float32_logits=False)[0].dtype == torch.bfloat16


def test_default_dtype_is_float32_whatever_was_saved(tmp_path: Path) -> None:
    tiny_gpt2().bfloat16().save_pretrained(tmp_path)
    assert Causal.from_pretrained(tmp_path).dtype == torch.float32
    assert Causal.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_two_dtypes_are_refused(gpt2_folder: Path) -> None:
    with pytest.raises(ValueError, match="differ"):
        Causal.from_pretrained(gpt2_folder, dtype=torch.float32, torch_dtype=torch.bfloat16)


def test_device_map_reaches_transformers(gpt2_folder: Path) -> None:
    model = Causal.from_pretrained(gpt2_folder, device_map={"": "cpu"})
    assert model.device.type == "cpu"
    assert not model.is_sequential_parallel


def test_offloaded_layers_are_refused() -> None:
    trunk = tiny_gpt2()
    trunk.hf_device_map = {"transformer": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="offloads layers"):
        Causal.from_pretrained(trunk)


def test_layers_on_several_devices_are_noticed() -> None:
    trunk = tiny_gpt2()
    trunk.hf_device_map = {"transformer": "cpu:0", "lm_head": "cpu:1"}
    model = Causal.from_pretrained(trunk)
    assert model.is_sequential_parallel
    assert model(TOKENS)[0].device == TOKENS.device


@pytest.mark.parametrize(("flag", "field"), [("load_in_8bit", "load_in_8bit"), ("load_in_4bit", "load_in_4bit")])
def test_bitsandbytes_flags_become_the_configuration_transformers_5_wants(
    monkeypatch: pytest.MonkeyPatch, flag: str, field: str
) -> None:
    from trl.models import loading

    passed = loading.transformers_arguments({flag: True})
    assert getattr(passed["quantization_config"], field)
    assert list(passed["device_map"]) == [""]
    assert "dtype" not in passed
    with pytest.raises(ValueError, match="not both"):
        loading.transformers_arguments({flag: True, "quantization_config": object()})


def test_remote_code_is_never_trusted_unless_asked(gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    original = transformers.AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(dict(kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spy)
    Causal.from_pretrained(gpt2_folder)
    Causal.from_pretrained(gpt2_folder, trust_remote_code=True)
    assert not seen[0].get("trust_remote_code", False)
    assert seen[1]["trust_remote_code"] is True


def test_code_in_a_folder_does_not_run(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    mapped = '"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil",'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "gpt2",', mapped))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|evil"):
        Causal.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "make"),
    [
        (Causal, lambda: transformers.GPT2Model(tiny_gpt2().config)),
        (Causal, lambda: transformers.GPT2ForSequenceClassification(tiny_gpt2().config)),
        (Seq2Seq, lambda: transformers.T5Model(tiny_t5().config)),
    ],
)
def test_no_language_model_head(cls: Any, make: Any) -> None:
    trunk = make()
    remedy = cls.transformers_parent_class.__name__
    with pytest.raises(ValueError, match=f"{type(trunk).__name__} has no language-model head.*{remedy}"):
        cls.from_pretrained(trunk)


@pytest.mark.parametrize("bad", [3, None, nn.Linear(2, 2), {"a": 1}])
def test_things_that_are_no_model(bad: Any) -> None:
    with pytest.raises(ValueError, match=type(bad).__name__):
        Causal.from_pretrained(bad)


def test_the_other_kind_of_model() -> None:
    with pytest.raises(ValueError, match="use AutoModelForSeq2SeqLMWithValueHead"):
        Causal.from_pretrained(tiny_t5())
    with pytest.raises(ValueError, match="use AutoModelForCausalLMWithValueHead"):
        Seq2Seq.from_pretrained(tiny_gpt2())


def test_arguments_that_a_model_object_cannot_use(gpt2_folder: Path) -> None:
    with pytest.raises(ValueError, match="v_head_init_stratgy"):
        Causal.from_pretrained(tiny_gpt2(), v_head_init_stratgy="normal")
    with pytest.raises(ValueError, match="v_head_range"):
        Causal(tiny_gpt2(), v_head_range=0.1)
    with pytest.raises(ValueError, match="xavier"):
        Causal.from_pretrained(gpt2_folder, v_head_init_strategy="xavier")


def test_the_base_class_loads_nothing(gpt2_folder: Path) -> None:
    with pytest.raises(ValueError, match="use one of its subclasses"):
        PreTrainedModelWrapper.from_pretrained(gpt2_folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="nowhere"):
        Causal.from_pretrained(tmp_path / "nowhere")


# -- what it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_attributes(cls: Any, make: Any) -> None:
    trunk = make()
    model = cls.from_pretrained(trunk)
    assert model.pretrained_model is trunk
    assert model.config is trunk.config
    assert model.generation_config is trunk.generation_config
    assert model.device.type == "cpu"
    assert not model.is_peft_model
    assert not model.is_sequential_parallel
    assert model.get_input_embeddings() is trunk.get_input_embeddings()
    assert issubclass(type(trunk), model.supported_pretrained_model_architectures)
    assert "lm_head" in cls.lm_head_namings
    model.generation_config = copy.deepcopy(trunk.generation_config)
    assert trunk.generation_config is model.generation_config


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_forward_is_logits_loss_and_values(cls: Any, make: Any) -> None:
    model = cls.from_pretrained(make()).eval()
    kwargs = inputs(model)
    output = model(**kwargs, labels=TOKENS)
    assert isinstance(output, tuple)
    logits, loss, values = output
    assert logits.shape == (2, 4, model.config.vocab_size)
    assert_close(loss, model.pretrained_model(**kwargs, labels=TOKENS).loss)
    hidden = model.pretrained_model(**kwargs, output_hidden_states=True)
    last = (hidden.decoder_hidden_states if model.is_encoder_decoder else hidden.hidden_states)[-1]
    assert_close(values, (last @ model.v_head.summary.weight.T + model.v_head.summary.bias)[..., 0])


def test_forward_takes_positional_tokens_masks_and_caches() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    whole = model(TOKENS, return_dict=True)[0]
    rest = model(TOKENS[:, 3:], first_three(model), torch.ones_like(TOKENS))[0]
    assert_close(rest[:, 0], whole[:, 3])


def first_three(model: Any) -> Any:
    """A cache that holds the first three of TOKENS."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model.pretrained_model(TOKENS[:, :3], cache, use_cache=True)
    return cache


@pytest.mark.parametrize("given", ["cache", "past_key_values"])
@pytest.mark.parametrize("taken", ["cache", "past_key_values"])
def test_forward_takes_a_cache_by_either_name(given: str, taken: str) -> None:
    plain, seen = with_cache_called(taken, tiny_gpt2())
    model = Causal.from_pretrained(plain).eval()
    cache = first_three(model)
    rest = model(TOKENS[:, 3:], **{given: cache})[0]
    assert seen[-1] is cache
    assert_close(rest[:, 0], model(TOKENS)[0][:, 3])


def test_forward_takes_one_cache() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    with pytest.raises(ValueError, match="two names for one argument"):
        model(TOKENS, cache=first_three(model), past_key_values=first_three(model))


def test_gradients_reach_the_trunk_through_the_values() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    model(TOKENS)[2].sum().backward()
    assert model.pretrained_model.transformer.wte.weight.grad.abs().sum() > 0
    assert model.v_head.summary.weight.grad.abs().sum() > 0


def test_forward_leaves_nothing_behind() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    model(TOKENS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError):
        model(TOKENS, no_such_argument_of_gpt2=object(), position_ids="bad")
    assert not any(module._forward_hooks for module in model.modules())


def test_generate_passes_through() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    ours = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, model.pretrained_model.generate(TOKENS, max_new_tokens=3, do_sample=False))
    assert torch.equal(ours, model.generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False))


def test_gradient_checkpointing_changes_memory_not_gradients() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).train()
    model.v_head.dropout.p = 0.0

    def is_on() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    def gradient() -> torch.Tensor:
        model.zero_grad()
        logits, _, values = model(TOKENS, use_cache=False)
        (logits.logsumexp(-1).sum() + values.sum()).backward()
        return model.pretrained_model.transformer.wte.weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert is_on()
    assert_close(gradient(), plain)
    model.gradient_checkpointing_disable()
    assert not is_on()


def test_vocabulary_grows() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(TOKENS)[0].shape[-1] == 70


# -- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_keys_of_state_and_of_parameters(cls: Any, make: Any) -> None:
    model = cls.from_pretrained(make())
    plain = set(model.pretrained_model.state_dict())
    assert set(model.state_dict()) == plain | {"v_head.summary.weight", "v_head.summary.bias"}
    names = {name for name, _ in model.named_parameters()}
    assert all(name.startswith(("pretrained_model.", "v_head.")) for name in names)


@pytest.mark.parametrize(("cls", "make"), MAKERS)
@pytest.mark.parametrize("spelling", ["", "pretrained_model."])
def test_state_loads_in_either_spelling(cls: Any, make: Any, spelling: str) -> None:
    source, target = cls.from_pretrained(make(seed=0)), cls.from_pretrained(make(seed=1))
    state = {k if k.startswith("v_head.") else spelling + k: v for k, v in source.state_dict().items()}
    assert not target.state_dict().keys() - source.state_dict().keys()
    target.load_state_dict(state)
    for name, tensor in source.state_dict().items():
        assert_close(target.state_dict()[name], tensor, 0)


def test_state_with_a_missing_or_unknown_entry_is_refused() -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    state = model.state_dict()
    del state["v_head.summary.bias"]
    with pytest.raises(RuntimeError, match=r"v_head\.summary\.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="surprise"):
        model.load_state_dict(model.state_dict() | {"surprise": torch.zeros(1)})


def test_state_inside_another_module() -> None:
    outer, other = (nn.ModuleDict({"policy": Causal.from_pretrained(tiny_gpt2(seed=s))}) for s in (0, 1))
    state = outer.state_dict()
    assert "policy.transformer.wte.weight" in state
    assert "policy.v_head.summary.bias" in state
    other.load_state_dict(state)
    assert_close(other["policy"].v_head.summary.weight, outer["policy"].v_head.summary.weight, 0)


def test_deep_copies_are_independent() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    before = model(TOKENS)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_close(model(TOKENS)[0], before, 0)
    assert not other(TOKENS)[0].any()


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_given_state_is_what_is_saved(cls: Any, make: Any, tmp_path: Path) -> None:
    model, source = cls.from_pretrained(make(seed=0)), cls.from_pretrained(make(seed=1))
    model.save_pretrained(tmp_path, state_dict=source.state_dict())
    loaded = cls.from_pretrained(tmp_path)
    for name, tensor in source.state_dict().items():
        assert_close(loaded.state_dict()[name], tensor, 0)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    Causal.from_pretrained(tiny_gpt2()).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_push_to_hub_uploads_what_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    calls: dict[str, Any] = {}

    class Hub:
        def __init__(self, token: Any = None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls["private"] = kwargs["private"]
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, folder_path: str, repo_id: str, **kwargs: Any) -> str:
            calls["files"] = {path.name for path in Path(folder_path).iterdir()}
            calls["repo"], calls["rest"] = repo_id, kwargs
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = Causal.from_pretrained(tiny_gpt2())
    assert model.push_to_hub("policy", commit_message="best", private=True, token="t") == "https://hub/commit"
    assert calls["repo"] == "me/policy"
    assert calls["rest"] == {"commit_message": "best"}
    assert calls["private"] is True
    assert calls["token"] == "t"
    assert {"model.safetensors", "config.json", "v_head.safetensors"} <= calls["files"]

    model.save_pretrained(tmp_path / "named", push_to_hub=True)
    assert calls["repo"] == "me/named"


def test_a_fresh_head_is_announced_once(gpt2_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trl"):
        Causal.from_pretrained(gpt2_folder)
    assert [record.levelno for record in caplog.records if "fresh" in record.message] == [logging.INFO]


# -- without peft ----------------------------------------------------------------------------------------------


def test_works_without_peft(monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = Causal.from_pretrained(gpt2_folder).eval()
    assert not model.is_peft_model
    model.save_pretrained(tmp_path)
    assert_close(Causal.from_pretrained(tmp_path).eval()(TOKENS)[2], model(TOKENS)[2])


def test_an_adapter_without_peft_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{gpt2_folder}"}}')
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        Causal.from_pretrained(tmp_path)
    with pytest.raises(ImportError, match="pip install peft"):
        Causal.from_pretrained(gpt2_folder, peft_config=object())


def test_what_says_how_to_load_a_model_is_ignored_beside_one() -> None:
    with pytest.warns(UserWarning, match="device_map, load_in_8bit, torch_dtype, trust_remote_code say how to load"):
        model = Causal.from_pretrained(
            tiny_gpt2(), torch_dtype=torch.bfloat16, device_map={"": 0}, load_in_8bit=True, trust_remote_code=True
        )
    assert model.pretrained_model.dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"torch_dtyp: no argument that applies to a model object \(did you mean torch_dtype"
    ):
        Causal.from_pretrained(tiny_gpt2(), torch_dtyp=torch.bfloat16)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_the_cache_is_the_fourth_value_on_request(seq2seq: bool) -> None:
    model = (Seq2Seq if seq2seq else Causal).from_pretrained(tiny_t5() if seq2seq else tiny_gpt2())
    model.eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])} | (
        {"decoder_input_ids": torch.tensor([[0, 4]])} if seq2seq else {}
    )
    plain, more = model(**inputs), model(**inputs, return_past_key_values=True)
    assert len(plain) == 3 and len(more) == 4 and torch.equal(plain[2], more[2])
    assert more[3].get_seq_length() == (2 if seq2seq else 3)
