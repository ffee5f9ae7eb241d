"""The cards of SFT, reward models, DPO and KTO: their code runs, and they state data, settings and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from tests.helpers import assert_close, tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora_config
from tests.trainer.offline.preferences import ROWS, settings
from tests.trainer.test_card import code_of, metadata_of
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.offline.stage_card import source_name

COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
STEPS = [{"prompt": "w5", "completions": ["w6", "w7 w8"], "labels": [True, 0.5]} for _ in ROWS]
LABELLED = [row | {"label": number % 2 == 0} for number, row in enumerate(COMPLETIONS)]
KINDS: dict[str, tuple[Any, Any, list[dict[str, Any]]]] = {
    "sft": (SFTTrainer, SFTConfig, COMPLETIONS),
    "reward-trainer": (RewardTrainer, RewardConfig, ROWS),
    "dpo": (DPOTrainer, DPOConfig, ROWS),
    "kto": (KTOTrainer, KTOConfig, LABELLED),
    "prm": (PRMTrainer, PRMConfig, STEPS),
}
# A classifier's adapter also trains its output layer.
TASKS = {"reward-trainer": "SEQ_CLS", "prm": "TOKEN_CLS"}


class Hub:
    """`HfApi` of a user who is called "me"."""

    uploaded: ClassVar[dict[str, str]] = {}

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return type("Url", (), {"repo_id": f"me/{name}"})()

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
        self.uploaded[repo_id] = (Path(folder_path) / "README.md").read_text()
        return "commit"


def base(folder: Path, make: Callable[[], Any] = tiny_gpt2) -> str:
    make().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def trainer(kind: str, folder: Path, model: Any = None, **options: Any) -> Any:
    make, config, rows = KINDS[kind]
    arguments = ("train_dataset", "eval_dataset", "peft_config")
    given = {name: options.pop(name) for name in arguments if name in options}
    args = settings(config, folder / "run", **options)
    return make(base(folder / "base") if model is None else model, args=args, **({"train_dataset": rows} | given))


def table(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `([\w/]+)` \| `?(.*?)`? \|$", card, re.MULTILINE))


@pytest.mark.parametrize(
    ("kind", "model"),
    [(kind, model) for kind in KINDS for model in ("decoder", "adapter", *["encoder-decoder"][: kind not in TASKS])],
)
def test_the_code_of_a_card_runs(kind: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {}
    if model == "adapter":
        options["peft_config"] = lora_config(task_type=TASKS.get(kind, "CAUSAL_LM"))
    make = tiny_t5 if model == "encoder-decoder" else tiny_gpt2
    it = trainer(kind, tmp_path, base(tmp_path / "base", make), **options)
    it.train()
    it.save_model(str(tmp_path / "saved"))
    assert it.model.config._name_or_path == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path / "saved")
    card = Path("README.md").read_text()
    names: dict[str, Any] = {}
    for code in code_of(card):
        exec(code, names)
    tokens = torch.tensor([[5, 6, 7]])
    more = {"decoder_input_ids": tokens} if model == "encoder-decoder" else {}
    with torch.no_grad():
        expected = it.model.eval()(input_ids=tokens, **more).logits
        assert torch.equal(names["model"].eval()(input_ids=tokens, **more).logits, expected)
        if kind == "reward-trainer":
            assert names["reward"](["w5"], [" w6 w7"]) == [float(expected)]
        if kind == "prm":
            assert_close(names["reward"].steps(["w5"], [["w6 w7"]])[0], expected[0, -1:].softmax(-1)[:, 1])
    metadata = metadata_of(card)
    assert metadata["tags"] == [kind] and metadata["library_name"] == ("peft" if model == "adapter" else "transformers")
    assert str(tmp_path) not in card and ("pip install peft" in card) == (model == "adapter")


@pytest.mark.parametrize("kind", KINDS)
def test_data_settings_and_results_are_stated(kind: str, tmp_path: Path) -> None:
    import json

    rows = KINDS[kind][2]
    (tmp_path / "secret-name").mkdir()
    path = tmp_path / "secret-name" / "likes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    it = trainer(
        kind,
        tmp_path,
        train_dataset=str(path),
        eval_dataset={"a": rows, "b": rows[:2]},
        learning_rate=0.25,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=2,
        **({"beta": 0.5} if kind in ("dpo", "kto") else {}),
    )
    it.train()
    metrics = it.evaluate()
    it.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "3 steps of 2 rows (epoch 1.5). Data: 3 rows of `likes.jsonl`." in card and "secret-name" not in card
    stated = table(card)
    assert stated["learning_rate"] == "0.25" and stated["max_steps"] == "3" and "output_dir" not in stated
    assert stated.get("beta") == ("0.5" if kind in ("dpo", "kto") else None)
    assert "per_device_train_batch_size" in stated and "eval_steps" not in stated and "use_cpu" not in stated
    for name in ("eval_a_loss", "eval_b_loss"):
        assert stated[name] == f"{metrics[name]:.4g}"
    last = next(row for row in reversed(it.state.log_history) if "loss" in row)
    assert stated["train/loss"] == f"{last['loss']:.4g}"
    assert not any("runtime" in name or "per_second" in name or "epoch" in name for name in stated if "/" in name)
    assert not {"eval_a_runtime", "eval_a_samples_per_second", "epoch"} & stated.keys()


def test_what_a_push_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(Hub, "uploaded", {})
    it = trainer("sft", tmp_path, hub_model_id="likes", hub_token="hf_abcdefghijklmnopqrstuvwxyz")
    it.train()
    found = it.push_to_hub(
        dataset_name="you/likes", tags="film", license="mit", data="Likes of one day.", metrics={"win_rate": 0.7128}
    )
    assert found == "commit"
    card = Hub.uploaded["me/likes"]
    metadata = metadata_of(card)
    assert (
        metadata["datasets"] == ["you/likes"] and metadata["tags"] == ["sft", "film"] and metadata["license"] == "mit"
    )
    assert "Data: Likes of one day." in card and table(card)["win_rate"] == "0.7128"
    assert 'source = "me/likes"' in card and "hf_abc" not in card and "tmp" not in card
    with pytest.raises(TypeError, match="datset"):
        it.push_to_hub(datset="you/likes")


def test_checkpoints_have_no_card_and_adapters_not_that_of_peft(tmp_path: Path) -> None:
    it = trainer("sft", tmp_path, save_strategy="steps", save_steps=1)
    it.train()
    assert not (tmp_path / "run" / "checkpoint-1" / "README.md").exists()
    lora = trainer("sft", tmp_path, peft_config=lora_config())
    for _ in range(2):  # peft adds to a card that is there
        lora.save_model()
        assert "PEFT" not in (tmp_path / "run" / "README.md").read_text().split("## Training")[1]


def test_a_model_that_was_not_trained(tmp_path: Path) -> None:
    it = trainer("dpo", tmp_path)
    it.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "# run\n" in card and "0 steps of 2 rows" in card and "## Results" not in card


def test_rows_of_an_unknown_number(tmp_path: Path) -> None:
    import datasets

    stream = datasets.Dataset.from_list(COMPLETIONS).to_iterable_dataset()
    it = trainer("sft", tmp_path, tiny_gpt2_with_tokenizer(tmp_path), train_dataset=stream)
    it.train()
    it.create_model_card(dataset_name="you/likes")
    assert "Data: rows of `you/likes`." in (tmp_path / "run" / "README.md").read_text()


def tiny_gpt2_with_tokenizer(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base(folder / "base"))


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "you").mkdir()
    (tmp_path / "you" / "local").mkdir()
    given = ["you/likes", "you/local", "/home/me/likes.csv", Path("data/likes.csv"), ROWS, None]
    assert [source_name(each) for each in given] == ["you/likes", "local", "likes.csv", "likes.csv", None, None]
