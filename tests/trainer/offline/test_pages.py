"""What docs/reward-models.md and docs/dpo.md show runs, and every key they explain is logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[3] / "docs"


def run(page: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/{page}, snippet {number}", "exec"), names)
    return names


def explained(page: str) -> set[str]:
    table = (DOCS / page).read_text(encoding="utf-8").split("| key | meaning | healthy |")[1].split("\n\n")[0]
    return {
        key
        for row in table.splitlines()
        if row.startswith("| `")
        for key in re.findall(r"`([^`]+)`", row.split("|")[1])
    }


def logged(trainer: Any) -> set[str]:
    plain = {"grad_norm", "learning_rate", "epoch", "step"}
    return set().union(*(row for row in trainer.state.log_history if "loss" in row)) - plain


def test_reward_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("reward-models.md")
    assert logged(names["trainer"]) | {"eval_expected_calibration_error"} == explained("reward-models.md")


def test_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("dpo.md")
    assert logged(names["trainer"]) == explained("dpo.md")
    assert logged(names["kto"]) - {"kl", "rewards/accuracies"} <= explained("dpo.md")
