"""Tables of completions for trackers, with secrets redacted and markup escaped."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from trl.trackers.completions import completions_table

COLUMNS = ["query", "response", "reward"]
ROWS = [["say", "a|b\n<b>c</b>", 0.123456], ["key", "hf_abcdefghijklmnop1234", -2.0]]


def test_tensorboard_gets_a_markdown_table() -> None:
    assert completions_table("tensorboard", COLUMNS, ROWS) == {
        "game_log": "| query | response | reward |\n"
        "| --- | --- | --- |\n"
        "| say | a&#124;b &lt;b&gt;c&lt;/b&gt; | 0.1235 |\n"
        "| key | [redacted] | -2 |"
    }


def test_wandb_gets_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda **kwargs: made.append(kwargs) or "table"))
    assert completions_table("wandb", tuple(COLUMNS), ROWS) == {"game_log": "table"}
    assert made == [{"columns": COLUMNS, "rows": [ROWS[0], ["key", "[redacted]", -2.0]]}]


def test_wandb_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="log_with='wandb' needs wandb: pip install wandb"):
        completions_table("wandb", COLUMNS, ROWS)


@pytest.mark.parametrize("tracker", [None, "mlflow"])
def test_other_trackers_get_no_table(tracker: str | None) -> None:
    assert completions_table(tracker, COLUMNS, ROWS) == {}
