"""Loading without pickles and without a checkpoint's code, from folders made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl.pretrained import (
    cache_if_unreachable,
    check_adapter_format,
    commit_of,
    find_file,
    hub_arguments,
    hub_problem,
    load_model,
    load_tokenizer,
    pickle_refused,
    trusted,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def safe(tmp_path: Path) -> str:
    """A folder with safetensors."""
    tiny_gpt2().save_pretrained(tmp_path / "safe")
    return str(tmp_path / "safe")


@pytest.fixture
def pickled(tmp_path: Path) -> str:
    """A folder with a legacy pickle alone."""
    model = tiny_gpt2()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    return str(tmp_path / "pickled")


def test_arguments_that_locate_files() -> None:
    given = {"revision": "main", "token": None, "dtype": "auto", "subfolder": "", "local_files_only": False}
    assert hub_arguments(given) == {"revision": "main", "subfolder": "", "local_files_only": False}


def test_files_of_a_folder(safe: str) -> None:
    assert find_file(safe, "config.json", {}) == str(Path(safe) / "config.json")
    assert find_file(safe, "missing.json", {}) is None
    assert commit_of(safe, "config.json", {}) is None


def test_the_commit_is_read_from_the_cache_that_holds_the_file(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    hub = {"cache_dir": str(tmp_path), "force_download": True}  # a lookup does not download again
    assert commit_of("someone/something", "config.json", hub) == commit


def test_safetensors_are_loaded(safe: str) -> None:
    loaded = load_model(AutoModelForCausalLM, safe)
    assert torch.equal(loaded.transformer.wte.weight, tiny_gpt2().transformer.wte.weight)


def test_a_pickle_is_loaded_on_request_only(pickled: str) -> None:
    with pytest.raises(
        ValueError, match=r"contains pytorch_model\.bin, a pickle, but no model\.safetensors: pass allow"
    ):
        load_model(AutoModelForCausalLM, pickled)
    loaded = load_model(AutoModelForCausalLM, pickled, allow_pickle=True)
    assert torch.equal(loaded.transformer.wte.weight, tiny_gpt2().transformer.wte.weight)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weights_only": False}, "weights_only=False would run code from a pickle"),
        ({"weights_only": False, "allow_pickle": True}, "weights_only=False would run code from a pickle"),
    ],
)
def test_arguments_that_would_run_code(safe: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_model(AutoModelForCausalLM, safe, **settings)


def test_a_preference_against_safetensors_reads_no_pickle(safe: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        loaded = load_model(AutoModelForCausalLM, safe, use_safetensors=False)
    assert torch.equal(loaded.transformer.wte.weight, tiny_gpt2().transformer.wte.weight)
    assert "safetensors are read all the same" in caplog.text


def test_an_adapter_on_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"connect|offline"):
        check_adapter_format("nobody/never", {}, allow_pickle=False)


def test_a_missing_folder_is_not_taken_for_a_pickle() -> None:
    with pytest.raises(OSError, match="no-such-folder"):
        load_model(AutoModelForCausalLM, "./no-such-folder")


@pytest.mark.parametrize(
    ("names", "config", "settings", "reason"),
    [
        (["adapter_model.safetensors"], {}, {}, None),
        (["adapter_model.safetensors", "adapter_model.bin"], {}, {}, None),
        (["adapter_model.bin"], {}, {"allow_pickle": True}, None),
        (["adapter_model.bin"], {}, {}, r"contains adapter_model\.bin, a pickle, but no adapter_model\.safetensors"),
        ([], {}, {"allow_pickle": True}, r"contains no adapter_model\.safetensors"),
        (
            ["adapter_model.safetensors"],
            {"megatron_config": {"a": 1}, "megatron_core": "os"},
            {},
            "has a megatron_config",
        ),
    ],
)
def test_formats_of_adapters(
    tmp_path: Path, names: list[str], config: dict[str, Any], settings: dict[str, Any], reason: str | None
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in names:
        (tmp_path / name).write_bytes(b"")  # it is looked for, not read
    options = {"allow_pickle": False, **settings}
    if reason is None:
        check_adapter_format(str(tmp_path), {}, **options)
        return
    with pytest.raises(ValueError, match=reason):
        check_adapter_format(str(tmp_path), {}, **options)


def test_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    tiny_tokenizer(padding_side="left").save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), trust_remote_code=None, padding_side="right")
    assert loaded("w5 w6")["input_ids"] == [5, 6] and loaded.padding_side == "right"


@pytest.mark.parametrize(("given", "expected"), [({}, False), ({"trust_remote_code": None}, False)])
def test_code_is_not_trusted_unless_asked_to(given: dict[str, Any], expected: bool) -> None:
    assert trusted(given) is expected
    assert trusted({"trust_remote_code": True}) is True


def test_the_message_names_both_files() -> None:
    message = pickle_refused("x/y", "a.bin", "a.safetensors")
    assert message.startswith("'x/y' contains a.bin, a pickle, but no a.safetensors: pass allow_pickle=True")


PROGRAM = """
import json, os, shutil, socket, sys, time
from pathlib import Path

server = socket.socket()
server.bind(("127.0.0.1", 0))  # refuses until it listens
here = f"http://127.0.0.1:{server.getsockname()[1]}"
os.environ["HF_ENDPOINT"] = "https://huggingface.co" if sys.argv[1] == "nameless" else here

from trl import AutoModelForCausalLMWithValueHead, assets
from trl.pretrained import load_tokenizer
from trl.rewards import ClassifierReward

def cached(name, source):
    folder = Path(os.environ["HF_HOME"]) / "hub" / f"models--me--{name}"
    shutil.copytree(source, folder / "snapshots" / ("0123456789" * 4))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123456789" * 4)

cached("tiny", assets.path("tiny-gpt2-reviews"))

def ask(hub):
    errors = []
    started = time.monotonic()
    for load in (AutoModelForCausalLMWithValueHead.from_pretrained, ClassifierReward.from_pretrained, load_tokenizer):
        try:
            load("someone/nothing")
        except OSError as error:
            errors.append(str(error))
    model = AutoModelForCausalLMWithValueHead.from_pretrained("me/tiny")
    load_tokenizer("me/tiny")
    print(json.dumps([hub, errors, model.commits, time.monotonic() - started]), flush=True)

for hub in sys.argv[1:]:  # each in a process of its own, as the hub is asked once a minute
    if hub == "silent":
        server.listen(100)
    if (child := os.fork()) == 0:
        ask(hub)
        sys.stderr.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, hub
"""


@pytest.mark.parametrize("hubs", [["refusing", "silent"], ["nameless"]], ids=" ".join)
def test_a_hub_out_of_reach(hubs: list[str], tmp_path: Path) -> None:
    """A port that refuses, one that never answers, and no name server: an error in seconds, and the cache all the same."""
    command = [sys.executable, "-c", PROGRAM, *hubs]
    if hubs == ["nameless"]:
        unshare = shutil.which("unshare")
        if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
            pytest.skip("this machine lets nobody make a network namespace")
        command = [unshare, "-rn", *command]
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(tmp_path),
        "HF_HUB_ETAG_TIMEOUT": "2",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [result[0] for result in results] == hubs
    assert "Retrying" not in done.stderr
    for _, errors, commits, seconds in results:
        assert len(errors) == 3
        for error in errors:
            assert error.startswith("'someone/nothing' is neither a local folder nor completely in the cache")
            assert "cannot be reached" in error or "does not answer" in error
            assert 'trl.assets.path("tiny-gpt2-reviews")' in error and "HF_HUB_OFFLINE" in error
        assert commits == {"me/tiny": "0123456789" * 4}
        assert seconds < 60  # a single file used to be retried for 23 seconds, and each load asks for several


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"'nobody/never' is neither .* cannot be downloaded: HF_HUB_OFFLINE=1 is set"):
        load_model(AutoModelForCausalLM, "nobody/never")


def test_the_hub_is_asked_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    now = [100.0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("trl.pretrained._answers", {})
    monkeypatch.setattr("trl.pretrained._ask", lambda endpoint, seconds: asked.append(endpoint) or "gone")
    monkeypatch.setattr("trl.pretrained.time", SimpleNamespace(monotonic=lambda: now[0]))
    assert hub_problem() == hub_problem() == "gone" and len(asked) == 1
    now[0] += 61
    assert hub_problem() == "gone" and len(asked) == 2
    with cache_if_unreachable("some/id"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with cache_if_unreachable("."):  # a folder
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
