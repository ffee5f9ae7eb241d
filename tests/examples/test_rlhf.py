"""The pipeline of examples/rlhf runs from texts to a table, goes on where it was interrupted, and reaches its results."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "rlhf"
QUICK: dict[str, Any] = {
    "base": "tiny-gpt2-reviews",
    "judge": "tiny-bert-sentiment",
    "max_new_tokens": 6,
    "data": {
        "source": "sampled",
        "sft_rows": 32,
        "pairs": 32,
        "test_pairs": 16,
        "prompts": 32,
        "test_prompts": 8,
        "sampled": {"per_prompt": 4, "max_new_tokens": 6},
    },
    "sft": {"max_steps": 2, "per_device_train_batch_size": 8, "save_steps": 1},
    "reward": {"max_steps": 2, "per_device_train_batch_size": 8, "save_steps": 1},
    "ppo": {"steps": 2, "batch_size": 8, "mini_batch_size": 4},
    "dpo": {"max_steps": 2, "per_device_train_batch_size": 8, "save_steps": 1},
    "best_of_n": {"most": 4},
}
SUMMARIES: dict[str, Any] = {
    "pipeline": "summaries",
    "base": "tiny-gpt2-reviews",
    "judge": "tiny-bert-sentiment",
    "max_new_tokens": 4,
    "lexicon": 12,
    "most": 2,
    "data": {"source": "reviews", "sft_rows": 60, "prompts": 40, "test_prompts": 8},
    "model": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "sft": QUICK["sft"],
    "ppo": QUICK["ppo"],
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the example, as the script does."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def written(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def prompts_of(path: Path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_pipeline_and_resume(tmp_path: Path, load: Any, capsys: pytest.CaptureFixture[str]):
    main = load("run").main
    arguments = [written(tmp_path / "quick.yaml", QUICK), "--seed", "3", "--out", str(tmp_path / "run")]
    first = main(arguments)
    root = tmp_path / "run"
    table = (root / "results.md").read_text(encoding="utf-8")
    assert "Texts: sampled." in table and "| PPO |" in table and "| DPO, step " in table and "| best of " in table
    stored = json.loads((root / "results.json").read_text(encoding="utf-8"))
    assert stored["reward"]["accuracy"] == first["reward"]["accuracy"]
    assert stored["judged"]["ppo"]["prompts"] == 8 and "rows" not in stored["judged"]["ppo"]
    kls, goal = stored["judged"]["dpo"]["kls"], stored["judged"]["dpo"]["kl_of_ppo"]
    assert abs(kls[str(stored["judged"]["dpo"]["step"])] - goal) == min(abs(kl - goal) for kl in kls.values())
    assert (root / "ppo" / "metrics.jsonl").exists()
    held_out = prompts_of(root / "data" / "test_prompts.jsonl")
    assert len(held_out) == 8 and not held_out & prompts_of(root / "data" / "prompts.jsonl")

    with pytest.raises(SystemExit, match="has a run already"):
        main(arguments)
    with pytest.raises(SystemExit, match="other settings of seed"):
        main([*arguments, "--resume", "--seed", "4"])

    report = load("report").main([str(root), "--responses", "2"])
    accuracy, row = first["reward"]["accuracy"], stored["judged"]["ppo"]
    assert f"| 3 | {accuracy:.1%} | {row['win_rate']['value']:.1%} |" in report and f"{accuracy:.1%} ± 0.0%" in report
    assert report.count("| SFT |") == report.count("| PPO |") == report.count("| DPO |") == 2

    # Interrupted in the reward model's second step, after its first checkpoint.
    before = (root / "reward" / "model" / "model.safetensors").read_bytes()
    for path in (root / "reward" / "checkpoint-2", root / "reward" / "model"):
        shutil.rmtree(path)
    (root / "reward" / "result.json").unlink()
    capsys.readouterr()
    again = main([*arguments, "--resume"])
    assert "sft: done before\nreward ..." in capsys.readouterr().out
    assert (root / "reward" / "model" / "model.safetensors").read_bytes() == before
    assert again["reward"]["accuracy"] == first["reward"]["accuracy"]


def test_settings_are_checked_before_anything_is_written(tmp_path: Path, load: Any):
    main = load("run").main
    root = tmp_path / "run"
    for change, error in (
        ({"dpo": {"betta": 0.1}}, TypeError),
        ({"sfd": {}}, ValueError),
        ({"data": {"source": "reveiws"}}, ValueError),
    ):
        with pytest.raises(error, match=str(next(iter(next(iter(change.values())) or change)))):
            main([written(tmp_path / "wrong.yaml", QUICK | change), "--out", str(root)])
    assert not root.exists()


def test_settings_of_a_stage_may_change_until_it_begins(tmp_path: Path, load: Any):
    begin = load("run").begin
    root = tmp_path / "run"
    begin(root, QUICK | {"seed": 0}, resume=False)
    (root / "sft").mkdir()
    begin(root, QUICK | {"seed": 0, "ppo": {"steps": 3}, "best_of_n": {"most": 8}}, resume=True)
    assert json.loads((root / "pipeline.json").read_text(encoding="utf-8"))["ppo"] == {"steps": 3}
    (root / "ppo").mkdir()
    with pytest.raises(SystemExit, match="other settings of sft, ppo") as caught:
        begin(root, QUICK | {"seed": 0, "sft": {"max_steps": 3}, "best_of_n": {"most": 8}}, resume=True)
    assert "best_of_n" not in str(caught.value)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(SystemExit, match="has other files"):
        begin(tmp_path / "other", QUICK | {"seed": 0}, resume=False)


def test_pairs_share_their_prompt(load: Any):
    texts = load("texts")
    rows = [
        texts.Text("A fine", " film indeed.", True),
        texts.Text("A fine", " mess of it.", False),
        texts.Text("A poor", " film indeed.", False),
        texts.Text("A great", " film indeed.", True),
        texts.Text("Not my", " kind of film.", False),
    ]
    assert texts.pairs(rows) == [
        {"prompt": "A fine", "chosen": " film indeed.", "rejected": " mess of it."},
        {"prompt": "A", "chosen": " great film indeed.", "rejected": " poor film indeed."},
    ]


def test_endings_are_whole_sentences(tmp_path: Path, load: Any):
    from trl import assets

    end = "I would watch it again with all of my friends, and so should you. It is a joy!"
    long = "Nobody could have known " + "that this was " * 40 + "so."
    reviews = [
        {"text": f"{long} {end}", "label": 1, "source": "imdb"},
        {"text": "Too short.", "label": 0, "source": "imdb"},
        {"text": end, "label": 1, "source": "rotten_tomatoes"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews), encoding="utf-8")
    (text,) = load("texts").endings(path, 60, assets.path("tiny-gpt2-reviews"))
    assert text.prompt == "I would" and text.prompt + text.completion == end and text.positive


def test_summaries_and_resume(tmp_path: Path, load: Any):
    """The encoder-decoder's pipeline, through the same runner."""
    main = load("run").main
    said = ("great", "boring", "lovely", "dull", "moving", "stupid", "funny", "awful", "clever", "weak")
    for name, offset in (("train", 0), ("test", 3)):
        rows = [
            {
                "text": f"The {name} of number {i} was {said[i % 10]} and its actors were {said[(3 * i + offset) % 10]} in the end."
            }
            for i in range(60)
        ]
        lines = "".join(json.dumps(row | {"label": 1, "source": "imdb"}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    settings = SUMMARIES | {"data": SUMMARIES["data"] | {"reviews": str(tmp_path)}}
    arguments = [written(tmp_path / "quick.yaml", settings), "--out", str(tmp_path / "run")]
    first = main(arguments)
    root = tmp_path / "run"
    table = (root / "results.md").read_text(encoding="utf-8")
    assert (
        "| overlap with the reference (the reward) |" in table
        and "| tone kept |" in table
        and "Texts: reviews" in table
    )
    assert first["judged"]["overlap"]["prompts"] == 8
    assert "rows" not in json.loads((root / "results.json").read_text(encoding="utf-8"))["judged"]["tone"]
    lexicon = set(first["data"]["lexicon"])
    for line in (root / "data" / "sft.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        summary = row["completion"].split()
        assert 1 <= len(summary) <= 2 and set(summary) <= lexicon
        places = [load("summaries").words(row["prompt"]).index(word) for word in summary]
        assert places == sorted(places)
    # Interrupted after PPO's last checkpoint.
    before = (root / "ppo" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(root / "ppo" / "model")
    (root / "ppo" / "result.json").unlink()
    assert main([*arguments, "--resume"])["ppo"]["steps"] == first["ppo"]["steps"] == 2
    assert (root / "ppo" / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="pipeline: 'sumaries' must be one of reviews, summaries"):
        main([written(tmp_path / "wrong.yaml", SUMMARIES | {"pipeline": "sumaries"}), "--out", str(tmp_path / "other")])


def test_the_overlap_of_summaries(load: Any):
    """F1 of the words, by hand."""
    overlap = load("summaries").overlap
    found = overlap([""] * 5, [" great, fun", "great", "fun great dull", "", "great great"], ["great fun"] * 5)
    assert found == pytest.approx([1.0, 2 / 3, 4 / 5, 0.0, 1 / 2])


@pytest.mark.slow
def test_results(tmp_path: Path, load: Any):
    if not (ROOT / "data" / "reviews" / "train.jsonl").exists():
        pytest.skip("needs data/reviews: python scripts/fetch_assets.py")
    settings = yaml.safe_load((FOLDER / "reviews.yaml").read_text(encoding="utf-8"))
    settings["data"] |= {"reviews": str(ROOT / "data" / "reviews"), "source": "reviews"}
    result = load("run").main([written(tmp_path / "reviews.yaml", settings), "--out", str(tmp_path / "run")])
    judged = result["judged"]
    assert result["reward"]["accuracy"] > 0.85
    assert judged["ppo"]["win_rate"]["value"] > 0.68 and judged["ppo"]["win_rate"]["low"] > 0.6
    assert judged["dpo"]["win_rate"]["low"] > 0.5 and judged["best_of_n"]["win_rate"]["low"] > 0.5
    assert 2 < judged["ppo"]["kl"]["value"] < 5
    for name in ("dpo", "best_of_n"):
        assert abs(judged[name]["kl"]["value"] - judged["ppo"]["kl"]["value"]) < 1


@pytest.mark.slow
def test_ppo_improves_summaries(tmp_path: Path, load: Any):
    """On texts that the embedded model writes: nothing needs to be fetched."""
    settings = yaml.safe_load((FOLDER / "summaries.yaml").read_text(encoding="utf-8"))
    settings["data"] |= {"source": "sampled"}
    judged = load("run").main([written(tmp_path / "summaries.yaml", settings), "--out", str(tmp_path / "run")])[
        "judged"
    ]
    assert judged["overlap"]["difference"]["low"] > 0 and judged["overlap"]["win_rate"]["value"] > 0.5
    assert judged["overlap"]["kl"]["value"] < 8
