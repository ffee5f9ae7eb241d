"""Tables of completions for trackers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from trl.redaction import redact
from trl.trackers.records import CompletionRecord

Row = Sequence[str | float | None]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as one value of a tracker's row, built by `completions_table` or `records_table`."""

    columns: list[str]
    rows: list[list[str | float | None]]

    def markdown(self) -> str:
        """The table in Markdown. Texts come from a model, so their HTML and Markdown's cell borders are escaped."""
        lines = ["| " + " | ".join(map(_cell, self.columns)) + " |", "|" + " --- |" * len(self.columns)]
        return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in self.rows)])


def completions_table(columns: Sequence[str], rows: Sequence[Row]) -> Table:
    """A table of texts and numbers with secrets redacted.

    Args:
        columns: column names.
        rows: one row per completion, in the order of `columns`.
    """
    return Table([str(column) for column in columns], redact([list(row) for row in rows]))


def records_table(records: Sequence[CompletionRecord], limit: int) -> Table:
    """The first `limit` samples of a step: prompt, completion, each of several rewards, score, KL, length."""
    shown = list(records[:limit])
    names = sorted({name for record in shown for name in record.rewards})
    names = names if len(names) > 1 else []
    columns = ["prompt", "completion", *(f"reward/{name}" for name in names), "score", "kl", "length"]
    rows = [[r.prompt, r.completion, *(r.rewards.get(name) for name in names), r.score, r.kl, r.length] for r in shown]
    return completions_table(columns, rows)


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return html.escape(text).replace("|", "&#124;").replace("\n", " ").replace("\r", " ")
