"""Tables of completions for trackers."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from trl.redaction import redact


def completions_table(
    tracker: str | None, columns: Sequence[str], rows: Sequence[Sequence[str | float]]
) -> dict[str, Any]:
    """Builds `{"game_log": table}`, with secrets redacted, for trackers that show tables or text; `{}` for others.

    Args:
        tracker: "wandb" gets a `wandb.Table`, "tensorboard" a Markdown table with escaped texts.
        columns: column names.
        rows: one row per completion, in the order of `columns`.

    Raises:
        ImportError: if `tracker` is "wandb" and wandb is not installed.
    """
    rows = redact(list(rows))
    if tracker == "wandb":
        try:
            import wandb
        except ImportError as error:
            raise ImportError("log_with='wandb' needs wandb: pip install wandb") from error
        return {"game_log": wandb.Table(columns=list(columns), rows=[list(row) for row in rows])}
    if tracker == "tensorboard":
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
        return {"game_log": "\n".join(lines)}
    return {}


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(str(value)).replace("|", "&#124;").replace("\n", " ").replace("\r", " ")
