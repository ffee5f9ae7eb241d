"""Reads a report's data from a run directory: rows, settings, state, findings, a bounded choice of completions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from trl.health import Band, bands, is_offline
from trl.trackers import (
    Ending,
    Finding,
    completion_steps,
    read_completions,
    read_config,
    read_ending,
    read_findings,
    read_metrics,
    read_summary,
)
from trl.untrusted import one_line

_MAX_STEPS_READ = 240  # completion files that one run contributes
_MAX_BYTES = 7_000_000  # of prompts and completions of one report
_MAX_TOKEN_BYTES = 3_000_000  # of per-token records of one report
MAX_TEXT = 4_000  # characters shown of a text


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as recorded so far."""

    path: Path
    rows: list[dict[str, Any]]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    """Contents of summary.json; empty unless the run has ended."""
    events: Sequence[str]
    """The last lines of events.log."""
    findings: Sequence[Finding]
    ending: Ending
    steps_recorded: Sequence[int]
    """Steps with a file of completions."""
    completions: list[dict[str, Any]] = field(default_factory=list)
    """Samples of some steps, in order."""

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return one_line(self.path.name)

    @property
    def algorithm(self) -> str:
        """Prefix of the algorithm's statistics."""
        return str((self.config.get("algorithm") or {}).get("name", "ppo"))

    @property
    def offline(self) -> bool:
        """Whether this is a run of an offline stage, which samples no completions."""
        return is_offline(self.config)

    @cached_property
    def bands(self) -> Mapping[str, Band]:
        """Healthy bands by key, for this run's settings."""
        return bands(self.config, self.rows[0] if self.rows else None)

    @property
    def target(self) -> int | None:
        """Planned steps; None if unknown."""
        steps = self.summary.get("target") or (self.config.get("train") or {}).get("steps")
        return int(steps) if steps else None

    def series(self, key: str) -> list[float | None]:
        """Values of a key, one per row; None where it is missing or not finite."""
        return [finite(row.get(key)) for row in self.rows]

    def keyed(self, key: str) -> str:
        """A key of the catalogue in this run's rows: "ppo/..." with the prefix of its algorithm."""
        return self.algorithm + key.removeprefix("ppo") if key.startswith("ppo/") else key


def finite(value: Any) -> float | None:
    """The number, or None for anything that is not a finite one."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def read_run(folder: str | Path, share: int = 1, *, completions: bool = True) -> Run:
    """Reads a run, also one that is being written.

    Args:
        folder: run directory.
        share: number of runs in the report, among which the room for completions is divided.
        completions: whether to read any.

    Raises:
        ValueError: if the folder is not a run directory, or a file in it is damaged; names the file.
    """
    path = Path(folder).resolve()
    events_file = path / "events.log"
    if not events_file.is_file():
        raise ValueError(f"{folder} is not a run directory: it has no events.log. Give the run_dir of `train`")
    config = read_config(path)
    steps = completion_steps(path)
    return Run(
        path=path,
        rows=read_metrics(path),
        config=config if isinstance(config, dict) else {},
        summary=read_summary(path),
        events=events_file.read_text(encoding="utf-8", errors="replace").splitlines()[-200:],
        findings=read_findings(path),
        ending=read_ending(path),
        steps_recorded=steps,
        completions=_read_samples(path, _spread(steps, _MAX_STEPS_READ // share), share) if completions else [],
    )


def age(run: Run) -> float:
    """Seconds since the run's last metrics row was written."""
    modified = (run.path / "metrics.jsonl").stat().st_mtime
    return max(0.0, datetime.now(timezone.utc).timestamp() - modified)


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps: a quarter of them the last ones, the others evenly spaced from the first."""
    if len(steps) <= count:
        return list(steps)
    recent = max(1, count // 4)
    older, wanted = steps[:-recent], count - recent
    return [older[round(i * (len(older) - 1) / max(1, wanted - 1))] for i in range(wanted)] + list(steps[-recent:])


def _read_samples(path: Path, steps: Iterable[int], share: int) -> list[dict[str, Any]]:
    """Samples of these steps, thinned out to the room that a report has."""
    batches = [read_completions(path, step) for step in steps]
    room = _MAX_BYTES // share // max(1, len(batches))
    token_room = _MAX_TOKEN_BYTES // share
    samples: list[dict[str, Any]] = []
    for batch in batches:
        samples += _thinned(batch, room)
    total = sum(len(sample.get("tokens") or "") for sample in samples)
    budget = 0.0  # spreads the token records that fit evenly over the run
    for sample in samples:
        if tokens := sample.get("tokens"):
            budget += len(tokens) * min(1.0, token_room / total)
            if budget >= len(tokens):
                budget -= len(tokens)
            else:
                sample["tokens"] = None
    return samples


def _thinned(batch: list[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """As many samples of a step as fit, in order: the most telling first, then the start of the batch."""

    def size(sample: Mapping[str, Any]) -> int:
        return 120 + min(len(sample["completion"]), MAX_TEXT) + min(len(sample["prompt"]), MAX_TEXT)

    scored = sorted((s for s in batch if finite(s.get("score")) is not None), key=lambda s: float(s["score"]))
    telling = [s for s in batch if s.get("tokens")] + scored[-1:] + scored[:1]
    telling += sorted(batch, key=lambda s: int(s["length"]))[-1:] + [s for s in batch if s.get("error")][:4]
    chosen: set[int] = set()
    for number, sample in enumerate([*telling, *batch]):
        room -= 0 if id(sample) in chosen else size(sample)
        if room < 0 and number > 0:
            break
        chosen.add(id(sample))
    return [sample for sample in batch if id(sample) in chosen]
