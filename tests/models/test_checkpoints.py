"""Files: what is written, what TRL 0.4-0.11 wrote, and pickles that must not run."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora_config, stir
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
HEAD = {
    "v_head.summary.weight": torch.linspace(-1, 1, 16)[None],
    "v_head.summary.bias": torch.tensor([0.75]),
}
MAKERS = [(Causal, tiny_gpt2), (Causal, tiny_llama), (Seq2Seq, tiny_t5)]


def same_state(model: Any, expected: Any) -> None:
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, tensor in model.state_dict().items():
        assert_close(tensor, theirs[name], 0)


def has_saved_head(model: Any) -> bool:
    return torch.equal(model.v_head.summary.weight, HEAD["v_head.summary.weight"])


def weights(trunk: Any) -> dict[str, torch.Tensor]:
    """As TRL 0.4-0.11 stored them: the plain names and `v_head.*`; tied weights once."""
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    if trunk.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state | HEAD


# -- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "make"), MAKERS)
@pytest.mark.parametrize("shard", [None, "5KB"])
def test_saves_and_loads(cls: Any, make: Any, shard: str | None, tmp_path: Path) -> None:
    model = cls.from_pretrained(make())
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    files = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" if shard else "model.safetensors") in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert set(load_file(tmp_path / "v_head.safetensors")) == set(HEAD)
    same_state(cls.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(("cls", "make"), MAKERS)
def test_plain_transformers_loads_it_unchanged(cls: Any, make: Any, tmp_path: Path) -> None:
    model = cls.from_pretrained(make())
    model.save_pretrained(tmp_path)
    plain, info = cls.transformers_parent_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same_state(plain, model.pretrained_model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model.pretrained_model).__name__]
    assert "v_head" not in json.dumps(config)


def test_saving_twice_replaces_the_head(tmp_path: Path) -> None:
    first, second = (Causal.from_pretrained(tiny_gpt2(seed=s)) for s in (0, 1))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    same_state(Causal.from_pretrained(tmp_path), second)


def test_half_precision_trunk_keeps_a_float32_head(tmp_path: Path) -> None:
    model = Causal.from_pretrained(tiny_gpt2().bfloat16())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "v_head.safetensors")["v_head.summary.weight"].dtype == torch.float32
    same_state(Causal.from_pretrained(tmp_path, dtype="auto"), model)


# -- what TRL 0.4-0.11 wrote -------------------------------------------------------------------------------------


def write_safetensors(folder: Path, trunk: Any) -> None:
    trunk.config.save_pretrained(folder)
    save_file(weights(trunk), folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded_safetensors(folder: Path, trunk: Any) -> None:
    trunk.config.save_pretrained(folder)
    state = weights(trunk)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: state[name] for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_bin(folder: Path, trunk: Any) -> None:
    trunk.config.save_pretrained(folder)
    torch.save(weights(trunk), folder / "pytorch_model.bin")


def write_sharded_bin(folder: Path, trunk: Any) -> None:
    trunk.config.save_pretrained(folder)
    state = weights(trunk)
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in shards.items():
        torch.save({name: state[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("cls", "make"), MAKERS)
@pytest.mark.parametrize("write", [write_safetensors, write_sharded_safetensors])
def test_head_inside_the_models_safetensors(cls: Any, make: Any, write: Callable[..., None], tmp_path: Path) -> None:
    trunk = make()
    write(tmp_path, trunk)
    model = cls.from_pretrained(tmp_path)
    assert has_saved_head(model)
    same_state(model.pretrained_model, trunk)


@pytest.mark.parametrize("write", [write_bin, write_sharded_bin])
def test_legacy_bin_needs_the_flag(write: Callable[..., None], tmp_path: Path) -> None:
    trunk = tiny_gpt2()
    write(tmp_path, trunk)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*allow_pickle=True"):
        Causal.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="allow_pickle=True"):
        Causal.from_pretrained(tmp_path, use_safetensors=False)
    model = Causal.from_pretrained(tmp_path, allow_pickle=True)
    assert has_saved_head(model)
    same_state(model.pretrained_model, trunk)


def write_legacy_adapter(folder: Path, base: Path) -> Any:
    """The adapter as peft stores it, and the head alone in `pytorch_model.bin`."""
    model = Causal.from_pretrained(base, peft_config=lora_config())
    stir(model)
    model.save_pretrained(folder)
    (folder / "v_head.safetensors").unlink()
    torch.save(HEAD, folder / "pytorch_model.bin")
    return model


def test_legacy_adapter_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    saved = write_legacy_adapter(tmp_path / "adapter", tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="trl"):
        model = Causal.from_pretrained(tmp_path / "adapter")
    assert not has_saved_head(model)
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "allow_pickle=True" in r.getMessage()]
    same_state(model.pretrained_model, saved.pretrained_model)
    assert has_saved_head(Causal.from_pretrained(tmp_path / "adapter", allow_pickle=True))


def test_adapter_weights_in_a_pickle_need_the_flag(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = Causal.from_pretrained(tmp_path / "base", peft_config=lora_config())
    stir(model)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*allow_pickle=True"):
        Causal.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"adapter_model\.bin.*allow_pickle=True"):
        model.add_and_load_reward_modeling_adapter(folder)
    same_state(Causal.from_pretrained(folder, allow_pickle=True), model)


def test_head_of_another_size_is_refused(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    wide = {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}
    save_file(wide, tmp_path / "v_head.safetensors")
    with pytest.raises(ValueError, match=r"\(1, 32\).*\(1, 16\)"):
        Causal.from_pretrained(tmp_path)


def test_shard_with_the_head_is_missing(tmp_path: Path) -> None:
    from trl.models.loading import read_value_head

    write_sharded_safetensors(tmp_path, tiny_gpt2())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"]["v_head.summary.bias"]).unlink()
    with pytest.raises(ValueError, match="its index places the value head"):
        read_value_head(str(tmp_path), {})


# -- hub ids -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """Puts a repository into a download cache, as the hub's client lays it out; there is no network in tests."""

    def put(repo: str, write: Callable[[Path], None]) -> Path:
        commit = hashlib.sha1(repo.encode()).hexdigest()
        folder = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        write(snapshot)
        return tmp_path / "cache"

    return put


def test_hub_id_with_a_head(hub: Any) -> None:
    model = Causal.from_pretrained(tiny_gpt2())
    cache = hub("me/policy", model.save_pretrained)
    same_state(Causal.from_pretrained("me/policy", cache_dir=cache), model)


def test_hub_id_without_a_head(hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    trunk = tiny_gpt2()
    cache = hub("me/plain", trunk.save_pretrained)
    with caplog.at_level(logging.INFO, logger="trl"):
        model = Causal.from_pretrained("me/plain", cache_dir=cache)
    assert [r.levelno for r in caplog.records if "fresh" in r.getMessage()] == [logging.INFO]
    same_state(model.pretrained_model, trunk)


def test_hub_id_of_a_sharded_legacy_checkpoint(hub: Any) -> None:
    cache = hub("me/old", lambda folder: write_sharded_safetensors(folder, tiny_gpt2()))
    assert has_saved_head(Causal.from_pretrained("me/old", cache_dir=cache))


def test_hub_id_of_a_legacy_bin(hub: Any) -> None:
    cache = hub("me/older", lambda folder: write_bin(folder, tiny_gpt2()))
    with pytest.raises((ValueError, OSError), match="safetensors"):
        Causal.from_pretrained("me/older", cache_dir=cache)
    assert has_saved_head(Causal.from_pretrained("me/older", cache_dir=cache, allow_pickle=True))


# -- pickles that run something (S1) -------------------------------------------------------------------------------


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


POSITIONS = (
    "pytorch_model.bin",
    "v_head.bin",
    "adapter_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "model.pt",
    "v_head.safetensors",
    "model.safetensors",
    "adapter_model.safetensors",
)


def test_the_canary_sings(tmp_path: Path) -> None:
    torch.save(HEAD | {"x": Canary(tmp_path / "ran")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["folder", "adapter"])
@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dump", [torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing))])
def test_no_pickle_runs(kind: str, position: str, allow_pickle: bool, dump: Any, tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "model"
    tiny_gpt2().save_pretrained(tmp_path / "base")
    if kind == "adapter":
        Causal.from_pretrained(tmp_path / "base", peft_config=lora_config()).save_pretrained(folder)
    else:
        Causal.from_pretrained(tiny_gpt2()).save_pretrained(folder)
    # Each file in turn is the only place where its contents could come from.
    (folder / "v_head.safetensors").unlink()
    if position.startswith("pytorch_model") and kind == "folder":
        (folder / "model.safetensors").unlink()
    if position.startswith("adapter_model") and kind == "adapter":
        (folder / "adapter_model.safetensors").unlink()
    dump(HEAD | {"v_head.canary": Canary(ran)}, folder / position)
    with suppress(Exception):  # whatever the reader of that file raises
        Causal.from_pretrained(folder, allow_pickle=allow_pickle)
    assert not ran.exists()


def test_unrestricted_unpickling_cannot_be_asked_for(tmp_path: Path) -> None:
    write_bin(tmp_path, tiny_gpt2())
    with pytest.raises(ValueError, match="weights_only=False"):
        Causal.from_pretrained(tmp_path, allow_pickle=True, weights_only=False)


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    from trl.models.loading import read_pickle

    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="contains a list"):
        read_pickle(str(tmp_path / "pytorch_model.bin"))


def test_loading_through_the_auto_class_is_what_users_of_transformers_get(tmp_path: Path) -> None:
    Causal.from_pretrained(tiny_gpt2()).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(plain(TOKENS).logits, tiny_gpt2()(TOKENS).logits)
