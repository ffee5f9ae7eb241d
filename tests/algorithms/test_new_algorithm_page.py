"""docs/how-to/new-algorithm.md, run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import assert_close
from tests.snippets import run_page, snippets
from trl.trackers import read_metrics

PAGE = Path(__file__).parents[2] / "docs/how-to/new-algorithm.md"


def test_the_page_s_algorithm_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(snippets(PAGE)) == 3
    monkeypatch.chdir(tmp_path)
    names = run_page(PAGE, tmp_path)
    scores, group = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1])
    advantages = names["best_against_rest"](scores, group, torch.ones(4).bool())
    assert_close(advantages, [-0.5, 1.0, -0.5, 0.0])
    scores, group = torch.tensor([2.0, 2.0, 1.0, torch.nan, 5.0, 5.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    advantages = names["best_against_rest"](scores, group, ~scores.isnan())
    assert_close(advantages[:3], [0.5, 0.5, -1.0])
    assert_close(advantages[4:], [0.0, 0.0])
    assert names["result"].steps == 2 and names["token_level"].uses_reference
    rows = read_metrics("runs/winner")
    assert all({"winner/loss/policy", "winner/policy/clipfrac"} <= set(row) for row in rows)
    assert rows[0]["winner/grad_norm"] > 0


def test_a_new_algorithm_costs_at_most_forty_lines() -> None:
    source = (Path(__file__).parents[2] / "trl/algorithms/grpo.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
