"""The card beside a saved or uploaded model: how to load it, from what it was made, and how."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml

from tests.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora_config
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead


def metadata_of(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def saved(folder: Path, card: str | None = None) -> Path:
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


class Hub:
    """`HfApi` of somebody who is called "me"."""

    calls: ClassVar[list[Any]] = []

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        self.calls.append(("create", repo_id, self.token, kwargs))
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        return type("Url", (str,), {"repo_id": full})(f"https://hub/{full}")

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, self.token, kwargs, files))
        return "https://hub/commit"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.mark.parametrize(("given", "full"), [("model", "me/model"), ("you/model", "you/model")])
def test_the_uploaded_card_loads_the_repository(given: str, full: str, make_trainer: Any, hub: type[Hub]) -> None:
    """A bare name is put into the namespace of the token's user, and the card has to say so."""
    assert make_trainer().push_to_hub(given, private=True, token="t", commit_message="best") == "https://hub/commit"
    (create, upload) = hub.calls
    assert create == ("create", given, "t", {"private": True, "exist_ok": True})
    assert upload[1:4] == (full, "t", {"commit_message": "best"})
    card = upload[4]["README.md"].decode()
    assert f"# {full}\n" in card and f'source = "{full}"' in card
    assert "tmp" not in card
    assert {"config.json", "model.safetensors", "v_head.safetensors", "tokenizer.json"} <= set(upload[4])


def test_no_other_project_of_the_same_name_is_linked(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer().create_model_card(str(tmp_path), model_name="Kind reviews")
    card = (tmp_path / "README.md").read_text()
    assert "pypi.org" not in card and "pip install trl" not in card
    assert metadata_of(card)["library_name"] == "transformers"  # the hub shows how that library loads a model
    assert "trl" not in metadata_of(card)["tags"]


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "adapter"])
def test_the_code_of_a_folders_card_runs(
    kind: str, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "encoder-decoder":
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    else:
        settings = {"peft_config": lora_config()} if kind == "adapter" else {}
        model = AutoModelForCausalLMWithValueHead.from_pretrained(saved(tmp_path / "base"), **settings)
    trainer = make_trainer(model=model, seq2seq=kind == "encoder-decoder")
    trainer.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    card = Path("README.md").read_text()
    names: dict[str, Any] = {}
    first, second = code_of(card)
    exec(first, names)
    assert len(names["tokenizer"]) == 61
    exec(second, names)
    assert torch.equal(names["model"].v_head.summary.weight, model.v_head.summary.weight)
    assert metadata_of(card)["library_name"] == ("peft" if kind == "adapter" else "transformers")
    assert ("pip install peft" in card) == (kind == "adapter")
    assert metadata_of(card).get("pipeline_tag") == (None if kind == "encoder-decoder" else "text-generation")


def card_from(make_trainer: Any, source: str, folder: Path) -> str:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    model.config._name_or_path = source
    make_trainer(model=model).create_model_card(str(folder))
    return (folder / "README.md").read_text()


def test_base_model_and_licence_of_a_hub_id(make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base.md"
    base.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: https://host/own\ntags: [x]\n---\n# It\n")
    asked: list[Any] = []

    def find(source: str, name: str, hub: Any) -> str:
        asked.append((source, name, hub))
        return str(base)

    monkeypatch.setattr("trl.trainer.card.find_file", find)
    card = card_from(make_trainer, "them/small", tmp_path)
    found = metadata_of(card)
    assert (found["base_model"], found["base_model_relation"]) == ("them/small", "finetune")
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "own", "https://host/own")
    assert "[them/small](https://huggingface.co/them/small)" in card
    assert asked == [("them/small", "README.md", {"local_files_only": True})]  # saving makes no network call


def test_a_push_looks_the_licence_up(make_trainer: Any, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("trl.trainer.card.find_file", lambda *arguments: asked.append(arguments))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    model.config._name_or_path = "them/small"
    make_trainer(model=model).push_to_hub("model", token="t")
    assert asked[0] == ("them/small", "README.md", {"token": "t"})
    assert {hub["local_files_only"] for *_, hub in asked[1:]} == {True}


def test_a_folders_own_card_says_what_it_was_made_from(make_trainer: Any, tmp_path: Path) -> None:
    """The path of a folder means nothing to others, and may hold a name."""
    origin = saved(tmp_path / "secret-name", "---\nlicense: mit\nbase_model: them/small\n---\n# It\n")
    card = card_from(make_trainer, str(origin), tmp_path)
    assert metadata_of(card)["base_model"] == "them/small" and metadata_of(card)["license"] == "mit"
    assert "secret-name" not in card


@pytest.mark.parametrize(
    "text",
    [
        None,
        "# no metadata\n",
        "---\nlicense: [\n---\n",
        "---\n- 1\n---\n",
        "---\nlicense: [a]\nbase_model: ../x\n---\n",
    ],
)
def test_what_is_not_known_is_left_out(text: str | None, make_trainer: Any, tmp_path: Path) -> None:
    found = metadata_of(card_from(make_trainer, str(saved(tmp_path / "start", text)), tmp_path))
    assert "base_model" not in found and "license" not in found
    for source in ("", str(tmp_path / "gone"), "a/b/c", "../x"):
        found = metadata_of(card_from(make_trainer, source, tmp_path))
        assert "base_model" not in found and "license" not in found


def test_how_it_was_trained(make_trainer: Any, make_batch: Any, tmp_path: Path) -> None:
    trainer = make_trainer(kl_penalty="k3", task_name="mine", stop_token_ids=[1, 2])
    for _ in range(3):
        trainer.step(*make_batch())
    trainer.create_model_card(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "3 steps of 4 samples" in card
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", card, re.MULTILINE))
    assert rows == {
        "learning_rate": "0.001", "batch_size": "4", "mini_batch_size": "2", "kl_penalty": "k3", "stop_token_ids": "[1, 2]",
    }  # fmt: skip
    assert f"torch {importlib.metadata.version('torch')}" in card
    assert re.search(r"trl 0\.\S+ \(a from-scratch implementation .*not the `trl` of the Python Package Index\)", card)
    assert "huggingface/trl" not in card  # another project


def test_data_and_results_are_stated(make_trainer: Any, tmp_path: Path, hub: type[Hub]) -> None:
    trainer = make_trainer()
    trainer.create_model_card(
        str(tmp_path), data="1,000 reviews; score of a classifier.", metrics={"eval/win": 0.71349}
    )
    card = (tmp_path / "README.md").read_text()
    assert " samples. Data: 1,000 reviews; score of a classifier.\n" in card
    assert "## Results" in card and "| `eval/win` | 0.7135 |" in card
    assert "datasets" not in metadata_of(card)
    trainer.create_model_card(str(tmp_path))
    assert "Data:" not in (tmp_path / "README.md").read_text() and "Results" not in (tmp_path / "README.md").read_text()
    trainer.push_to_hub("me/model", data="you/reviews", metrics={"kl": 3.0}, commit_message="best")
    upload = hub.calls[-1]
    assert upload[3] == {"commit_message": "best"}
    uploaded = upload[4]["README.md"].decode()
    assert metadata_of(uploaded)["datasets"] == ["you/reviews"] and "| `kl` | 3 |" in uploaded
