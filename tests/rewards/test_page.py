"""What docs/rewards.md shows runs. That importing and scoring talk to nobody: trainer/test_offline.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import trl.rewards
from tests.snippets import run_page, snippets

PAGE = Path(__file__).parents[2] / "docs/rewards.md"


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(snippets(PAGE)) >= 9
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(PAGE, tmp_path)
    assert (tmp_path / "scores.jsonl").exists()


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    inner = {"FunctionReward", "Guard", "RewardMix", "ScoreCache"}  # what as_reward makes and takes
    assert [name for name in trl.rewards.__all__ if name not in text and name not in inner] == []


def test_public_names_load() -> None:
    assert [name for name in trl.rewards.__all__ if getattr(trl.rewards, name) is None] == []
    assert set(trl.rewards.__all__) <= set(dir(trl.rewards))
    with pytest.raises(AttributeError, match="no attribute 'RewardMux'"):
        trl.rewards.RewardMux
