"""docs/how-to/new-algorithm.md, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_close
from trl.trackers import read_metrics

PAGE = Path(__file__).parents[2] / "docs/how-to/new-algorithm.md"


def test_the_page_s_algorithm_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    shorter = [block.replace("steps=10", "steps=2").replace("batch_size=64", "batch_size=32") for block in blocks]
    assert shorter[1] != blocks[1]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in shorter:
        exec(compile(block, PAGE.name, "exec"), names)
    scores, group = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1])
    advantages = names["best_against_rest"](scores, group, torch.ones(4).bool())
    assert_close(advantages, [-0.5, 1.0, -0.5, 1.0])
    assert names["result"].steps == 2 and names["token_level"].uses_reference
    rows = read_metrics("runs/best-of-n")
    assert all({"best_of_n/loss/policy", "best_of_n/policy/clipfrac"} <= set(row) for row in rows)
    assert rows[0]["best_of_n/grad_norm"] > 0


def test_a_new_algorithm_costs_at_most_forty_lines() -> None:
    source = (Path(__file__).parents[2] / "trl/algorithms/grpo.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
