"""docs/best-of-n.md and docs/adapters.md, run as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def run_page(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs every Python block of a page in `folder`; returns the names that they define."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "page"}
    with warnings.catch_warnings():
        for message in ("no dataset is given", "objective/kl is", ".*is_gradient_checkpointing.*", "Could not find"):
            warnings.filterwarnings("ignore", message)
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/{name}, block {number}", "exec"), names)
    return names


def test_best_of_n(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_page("best-of-n.md", tmp_path, monkeypatch)
    assert [len(texts) for texts in names["best"]] == [2, 2]
    assert all(text.startswith("This film") for text in names["best"][0])
    curve = names["curve"]
    assert [point.n for point in curve] == [1, 2, 4, 8]
    assert sorted(point.score for point in curve) == [point.score for point in curve]


def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    names = run_page("adapters.md", tmp_path, monkeypatch)
    assert names["result"].steps == 2
    assert names["trainer"].ref_model is None
    assert {"config.json", "model.safetensors", "v_head.safetensors"} <= {
        p.name for p in (tmp_path / "merged").iterdir()
    }
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Data: first words of eight reviews; a random reward." in card
    assert "| `score/mean` | 0.1 |" in card
