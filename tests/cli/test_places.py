"""Required settings, files, and S10: names of runs stay inside their root."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl.cli import catalogue, places
from trl.cli.problems import UsageError
from trl.cli.resolve import Flag, Resolved, resolve
from trl.trackers import RunDirectory


def resolved(**settings: str) -> Resolved:
    flags = [
        Flag(setting=catalogue.settings()[name.replace("__", ".")], texts=(text,), spelling="--x")
        for name, text in settings.items()
    ]
    return resolve("ppo", environment={}, flags=flags)


GOOD = {"model__name": "gpt2", "data__prompts": "review-openings", "reward__functions": "a:f", "train__steps": "1"}


def test_what_is_missing_is_named_all_at_once() -> None:
    places.check(resolved(**GOOD))
    with pytest.raises(UsageError) as raised:
        places.check(resolved())
    assert [p.text.split()[0] for p in raised.value.problems] == [
        "model.name", "data.prompts", "reward.functions", "train.steps",
    ]  # fmt: skip
    places.check(resolved(**(GOOD | {"train__episodes": "5"}) | {"train__steps": "null"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data__prompts": "prompt.jsonl"}, "there is no file prompt.jsonl: did you mean prompts.jsonl?"),
        ({"data__prompts": "review-opening"}, "did you mean review-openings?"),
        ({"data__eval_prompts": "x.csv"}, "there is no file x.csv"),
        ({"model__name": "tiny-gpt2-review"}, "there is no model tiny-gpt2-review: did you mean tiny-gpt2-reviews?"),
    ],
)
def test_files_that_are_missing(change: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(UsageError) as raised:
        places.check(resolved(**(GOOD | change)))
    assert said in str(raised.value)


def folder(**settings: str) -> str:
    return str(places.with_run_folder(resolved(**settings), "default")["train.run_dir"])


def test_the_run_folder(tmp_path: Path) -> None:
    assert folder() == str(tmp_path / "runs" / "default")
    assert folder(train__run_name="a/b") == str(tmp_path / "runs" / "a" / "b")
    assert folder(train__run_name="a", train__root="elsewhere") == str(tmp_path / "elsewhere" / "a")
    assert folder(train__run_dir="x/../y") == str(tmp_path / "y")  # a path is the operator's choice


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../../x", "/tmp/x", ".", "a\nb", "a\x00b", "x" * 300, "link/x", "C:\\x", "a\\..\\..\\b"]
)
def test_names_stay_inside_their_root(name: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to("/tmp")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"train\.run_name"):
        folder(train__run_name=name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "runs" / "done").close()
    with pytest.raises(UsageError, match=r"runs/done already holds a run: trl resume runs/done goes on with it"):
        folder(train__run_name="done")
    (tmp_path / "runs" / "full").mkdir()
    (tmp_path / "runs" / "full" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="runs/full is not an empty folder"):
        folder(train__run_name="full")
    (tmp_path / "runs" / "file").write_text("")
    with pytest.raises(UsageError, match="not an empty folder"):
        folder(train__run_name="file")


def test_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    (tmp_path / "model").mkdir()
    found = places.with_absolute_paths(
        resolved(data__prompts="p.jsonl", model__name="model", reward__functions="[r.py:f, a.b:g, 'classifier:model', 'm=classifier:tiny-bert-sentiment']")
    )  # fmt: skip
    assert found["data.prompts"] == str(tmp_path / "p.jsonl") and found["model.name"] == str(tmp_path / "model")
    assert found["reward.functions"] == {
        "f": f"{tmp_path}/r.py:f", "g": "a.b:g", "model": f"classifier:{tmp_path}/model", "m": "classifier:tiny-bert-sentiment",
    }  # fmt: skip
    hub = places.with_absolute_paths(resolved(**GOOD))
    assert (hub["model.name"], hub["data.prompts"]) == ("gpt2", "review-openings")
