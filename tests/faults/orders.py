"""The jobs and orders that the tests of this folder share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Undisturbed = Callable[..., dict[str, Any]]

FULL, LORA, SEQ2SEQ = {"case": "full"}, {"case": "lora"}, {"case": "seq2seq"}


def at(kind: str, n: int, act: str = "SIGKILL", **more: Any) -> dict[str, Any]:
    """At the n-th event of this kind, `act`."""
    return {"kind": kind, "n": n, "act": act, **more}


def full_disk(place: str, first: int, last: int = 10**9) -> dict[str, Any]:
    """Writes number `first` to `last` find no room."""
    return {"act": "full", "place": place, "n": first, "until": last}


def losses(value: str, first: int, last: int) -> dict[str, Any]:
    """Losses of microbatches number `first` to `last` are this."""
    return {"act": "loss", "value": value, "n": first, "until": last}


def checkpoints(folder: Path) -> list[str]:
    """Names of the complete checkpoints of the run in `folder`, oldest first."""
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("step-*"))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The run's rows of metrics."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
