"""Promises S1 and S2: what a model's folder holds is data, and none of it runs unless the caller asks for that."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from tests.conformance.setting import make_trainer
from tests.helpers import VOCABULARY, assert_close, tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora_config, stir
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.rewards import ClassifierReward

pytestmark = pytest.mark.conformance

ROOT = Path(__file__).parent.parent.parent
HEAD = {"v_head.summary.weight": torch.zeros(1, 16), "v_head.summary.bias": torch.zeros(1)}


def tiny_classifier() -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    return BertForSequenceClassification(BertConfig(**settings, intermediate_size=24, pad_token_id=0, **labels)).eval()


def write_classifier(folder: Path) -> None:
    tiny_classifier().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_policy(folder: Path, trunk: Any = None) -> None:
    Causal.from_pretrained(tiny_gpt2() if trunk is None else trunk).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_adapter(folder: Path, base: Path) -> None:
    model = Causal.from_pretrained(base, peft_config=lora_config())
    stir(model)
    model.save_pretrained(folder)


def write_adapted_classifier(folder: Path) -> None:
    import peft

    write_classifier(folder.parent / "base")
    base = BertForSequenceClassification.from_pretrained(folder.parent / "base")
    settings = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    with warnings.catch_warnings():  # peft asks transformers under an older name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft.get_peft_model(base, peft.LoraConfig(**settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


# -- S1: pickles ---------------------------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def plain_pickle(thing: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(thing))


# What readers look for, under this library's, transformers', peft's and accelerate's names, today and formerly.
FOREIGN_FILES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "v_head.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "random_states_0.pkl",
    "model.pt",
    "tokenizer.pkl",
    "vocab.pkl",
)


def load_policy(folder: Path) -> None:
    Causal.from_pretrained(folder)


def load_as_reward_adapter(folder: Path) -> None:
    policy = Causal.from_pretrained(folder.parent / "base", peft_config=lora_config())
    policy.add_and_load_reward_modeling_adapter(folder)


def load_classifier(folder: Path) -> None:
    ClassifierReward.from_pretrained(str(folder))


def load_classifier_by_its_model(folder: Path) -> None:
    model = tiny_classifier()
    model.config._name_or_path = str(folder)
    ClassifierReward(model)


LOADERS: dict[str, Callable[[Path], None]] = {
    "policy": load_policy,
    "adapter": load_policy,
    "reward adapter": load_as_reward_adapter,
    "classifier": load_classifier,
    "classifier's tokenizer": load_classifier_by_its_model,
    "adapter of a classifier": load_classifier,
    "base with an adapter inside": load_policy,
}


def write_folder(kind: str, folder: Path) -> None:
    if kind == "adapter of a classifier":
        write_adapted_classifier(folder)
    elif "classifier" in kind:
        write_classifier(folder)
    elif kind == "base with an adapter inside":  # of the adapter in the folder, of which the other files are the base's
        write_policy(folder.parent / "other")
        write_policy(folder)
        write_adapter(folder.parent / "inner", folder.parent / "other")
        for file in (folder.parent / "inner").glob("adapter_*"):
            shutil.copy(file, folder)
    elif "adapter" in kind:
        write_policy(folder.parent / "base")
        write_adapter(folder, folder.parent / "base")
    else:
        write_policy(folder)


def without_safetensors(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def test_s1_the_canary_sings(tmp_path: Path) -> None:
    torch.save({"x": Canary(tmp_path / "ran")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("dump", [torch.save, plain_pickle])
@pytest.mark.parametrize("kind", LOADERS)
def test_s1_no_pickle_in_any_file_of_a_model_runs(kind: str, dump: Any, tmp_path: Path) -> None:
    """A canary in the place of each file that is there, one at a time, and of each that a reader might look for."""
    ran, folder = tmp_path / "ran", tmp_path / "model"
    write_folder(kind, folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    for position in [path.name for path in files] + list(FOREIGN_FILES):
        for path, data in whole.items():
            path.write_bytes(data)
        if position.endswith((".bin", ".pt")):
            without_safetensors(folder)
        dump(HEAD | {"v_head.canary": Canary(ran)}, folder / position)
        with suppress(Exception):  # whatever the reader of that file raises
            LOADERS[kind](folder)
        assert not ran.exists(), position
        if folder / position not in whole:
            (folder / position).unlink()


def test_s1_no_pickle_in_any_file_of_a_runs_checkpoint_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    make_trainer().save_checkpoint(tmp_path / "run")
    files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert len(files) >= 3
    whole = {path: path.read_bytes() for path in files}
    folder = files[0].parent
    for position in [*files, *(folder / name for name in FOREIGN_FILES)]:
        for dump in (torch.save, plain_pickle):
            for path, data in whole.items():
                path.write_bytes(data)
            dump({"canary": Canary(ran)}, position)
            with suppress(Exception):
                make_trainer().load_checkpoint(tmp_path / "run")
            assert not ran.exists(), position
        if position not in whole:
            position.unlink()


def test_s1_a_classifier_in_a_pickle_needs_the_flag(tmp_path: Path) -> None:
    write_classifier(tmp_path)
    safe = ClassifierReward.from_pretrained(str(tmp_path))(["w5 "], ["w6"])
    without_safetensors(tmp_path)
    torch.save(tiny_classifier().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle.*allow_pickle=True"):
        ClassifierReward.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="allow_pickle=True"):
        ClassifierReward.from_pretrained(str(tmp_path), use_safetensors=False)
    with pytest.raises(ValueError, match="weights_only=False"):
        ClassifierReward.from_pretrained(str(tmp_path), allow_pickle=True, weights_only=False)
    assert_close(ClassifierReward.from_pretrained(str(tmp_path), allow_pickle=True)(["w5 "], ["w6"]), safe)


@pytest.mark.parametrize(
    "kind", ["adapter", "reward adapter", "adapter of a classifier", "base with an adapter inside"]
)
def test_s1_an_adapter_in_a_pickle_needs_the_flag(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(kind, folder)
    if kind != "reward adapter":  # this one has no score head
        LOADERS[kind](folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle.*allow_pickle=True"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", ["adapter", "reward adapter", "adapter of a classifier"])
def test_s2_an_adapter_names_no_module_to_import(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "canary_core.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    write_folder(kind, tmp_path / "model")
    file = tmp_path / "model" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"megatron_config": {"a": 1}, "megatron_core": "canary_core"}
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="megatron_config"):
        LOADERS[kind](tmp_path / "model")
    assert not (tmp_path / "ran").exists()


# -- S2: a checkpoint's own code -----------------------------------------------------------------------------------

CODE = """
import pathlib
pathlib.Path({ran!r}).touch()
from transformers import {config}, {model}, PreTrainedTokenizerFast

class OwnConfig({config}):
    model_type = "own-make"

class OwnModel({model}):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification")


def give_own_code(folder: Path, ran: Path, config: str, model: str, *, own_type: bool = True) -> None:
    """Adds code to a saved model that would write a file, and has its JSON files name it."""
    (folder / "own.py").write_text(CODE.format(ran=str(ran), config=config, model=model))
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "own.OwnConfig", **dict.fromkeys(AUTO_MODELS, "own.OwnModel")}
    if own_type:
        settings["model_type"] = "own-make"
    (folder / "config.json").write_text(json.dumps(settings))
    file = folder / "tokenizer_config.json"
    if file.exists():
        settings = json.loads(file.read_text())
        settings |= {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
        file.write_text(json.dumps(settings))


def write_own_code(kind: str, folder: Path, ran: Path) -> None:
    folder.mkdir()
    if kind == "encoder-decoder":
        tiny_t5().save_pretrained(folder)
        give_own_code(folder, ran, "T5Config", "T5ForConditionalGeneration")
    elif "adapter" in kind:
        write_policy(folder.parent / "base")
        write_adapter(folder, folder.parent / "base")
        give_own_code(folder.parent / "base", ran, "GPT2Config", "GPT2LMHeadModel")
    elif "classifier" in kind:
        write_classifier(folder)
        give_own_code(folder, ran, "BertConfig", "BertForSequenceClassification")
    else:
        write_policy(folder)
        give_own_code(folder, ran, "GPT2Config", "GPT2LMHeadModel")


def load_seq2seq(folder: Path, **options: Any) -> Any:
    return Seq2Seq.from_pretrained(folder, **options)


def load_causal(folder: Path, **options: Any) -> Any:
    return Causal.from_pretrained(folder, **options)


def load_reward(folder: Path, **options: Any) -> Any:
    return ClassifierReward.from_pretrained(str(folder), **options)


CODE_LOADERS: dict[str, Callable[..., Any]] = {
    "policy": load_causal,
    "encoder-decoder": load_seq2seq,
    "adapter": load_causal,
    "classifier": load_reward,
}


@pytest.fixture
def yes_on_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody, or a pipe, says yes to whatever is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *args: "y")


@pytest.fixture(autouse=True)
def code_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code that transformers imports from a checkpoint is copied here, not into the cache of whoever runs the tests."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("kind", CODE_LOADERS)
def test_s2_a_checkpoints_code_is_refused_without_asking(kind: str, yes_on_stdin: None, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write_own_code(kind, tmp_path / "model", ran)
    for options in ({}, {"trust_remote_code": None}, {"trust_remote_code": False}):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            CODE_LOADERS[kind](tmp_path / "model", **options)
        assert not ran.exists()


@pytest.mark.parametrize("given", ["model", "tokenizer"])
def test_s2_a_classifiers_tokenizer_is_refused_without_asking(given: str, yes_on_stdin: None, tmp_path: Path) -> None:
    """Its weights may be of a known make, and its tokenizer alone bring code."""
    ran = tmp_path / "ran"
    write_classifier(tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_bytes()
    give_own_code(tmp_path / "model", ran, "BertConfig", "BertForSequenceClassification")
    (tmp_path / "model" / "config.json").write_bytes(config)
    with suppress(ValueError):  # transformers may find a class of its own for it
        if given == "tokenizer":
            ClassifierReward.from_pretrained(str(tmp_path / "model"))
        else:
            load_classifier_by_its_model(tmp_path / "model")
    assert not ran.exists()


def test_s2_code_beside_a_known_make_is_not_run(yes_on_stdin: None, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write_policy(tmp_path / "model")
    give_own_code(tmp_path / "model", ran, "GPT2Config", "GPT2LMHeadModel", own_type=False)
    with suppress(ValueError):
        Causal.from_pretrained(tmp_path / "model")
    assert not ran.exists()


def test_s2_the_caller_may_trust(tmp_path: Path) -> None:
    """The checkpoint of the tests above does run its code: what they refuse is not merely broken."""
    ran = tmp_path / "ran"
    write_own_code("policy", tmp_path / "model", ran)
    model = Causal.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert ran.exists() and type(model.pretrained_model).__name__ == "OwnModel"


def test_s2_generation_code_is_refused_without_asking(yes_on_stdin: None, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "recipe" / "custom_generate").mkdir(parents=True)
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\ndef generate(model, **kwargs): return None\n"
    (tmp_path / "recipe" / "custom_generate" / "generate.py").write_text(code)
    model = Causal.from_pretrained(tiny_gpt2())
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        model.generate(torch.tensor([[5, 6]]), custom_generate=str(tmp_path / "recipe"))
    assert not ran.exists()


def put_into_cache(cache: Path, repo: str, write: Callable[[Path], None], revisions: dict[str, str]) -> None:
    """A repository as the hub's client lays it out; there is no network in tests."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for name, commit in revisions.items():
        (folder / "refs" / name).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        write(folder / "snapshots" / commit)


def test_s2_revisions_can_be_pinned_and_are_recorded(tmp_path: Path) -> None:
    first, second, third = "a" * 40, "b" * 40, "c" * 40
    cache = tmp_path / "cache"
    put_into_cache(cache, "me/base", write_policy, {"main": first, "v1": second})
    adapter = Causal.from_pretrained("me/base", cache_dir=cache, peft_config=lora_config())
    save = partial(adapter.save_pretrained, save_embedding_layers=False)
    put_into_cache(cache, "me/adapter", save, {"main": third})
    assert Causal.from_pretrained("me/base", cache_dir=cache).commits == {"me/base": first}
    assert Causal.from_pretrained("me/adapter", cache_dir=cache).commits == {"me/adapter": third, "me/base": first}
    pinned = Causal.from_pretrained("me/base", cache_dir=cache, revision="v1")
    trainer = make_trainer(model=pinned, batch_size=2, mini_batch_size=2)
    trainer.train(
        ["w5", "w6"], reward=lambda prompts, completions, **columns: [1.0] * len(prompts), steps=1,
        run_dir=tmp_path / "run", generation={"max_new_tokens": 3}, progress=False,
    )  # fmt: skip
    settings = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert settings["model"] == {"commits": {"me/base": second}}


@pytest.mark.slow
def test_s2_a_script_with_yes_on_its_stdin(tmp_path: Path) -> None:
    """As a user would meet it: a process of its own, and a pipe that says y."""
    ran = tmp_path / "ran"
    write_own_code("policy", tmp_path / "model", ran)
    code = "import sys; from trl import AutoModelForCausalLMWithValueHead as M; M.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    surroundings = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=surroundings, input="y\n" * 20, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr
    assert not ran.exists()


def test_s2_every_call_of_an_auto_class_says_whom_it_trusts() -> None:
    """`from_pretrained` of transformers asks on stdin where `trust_remote_code` is left out."""
    missing = []
    for folder in ("trl", "examples", "scripts", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = ast.unparse(node.func.value)
                by_auto_class = owner in AUTO_CLASSES and node.func.attr == "from_pretrained"
                names = [keyword.arg for keyword in node.keywords]
                if by_auto_class and "trust_remote_code" not in names:
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert missing == []


AUTO_CLASSES = {"AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModel", *AUTO_MODELS}
