"""Finds runs on disk and lists them: algorithm, state, steps, score, KL, loss, when, and where the model is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl.cli.arguments import Invocation
from trl.cli.problems import Problem, UsageError, did_you_mean, shorten
from trl.trackers import Ending, RunDirectory, read_ending, read_metrics, read_summary, run_folder

ROOT = "runs"
_DEPTH = 3  # folders under the root in which runs are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run in the table."""

    path: str
    algorithm: str  # "ppo", "grpo", "sft"; "" before the run has settings
    state: str  # see `trl.trackers.Ending`
    step: int
    target: int | None
    score: float | None
    kl: float | None
    loss: float | None  # of an offline stage, in its last row; in evaluation if there is one
    changed: float  # Unix time of the last record
    model: str | None  # folder of the final model
    note: str = ""  # the error of a failed run


def main(invocation: Invocation) -> int:
    """`trl runs [ROOT]`."""
    root = Path(invocation.arguments[0] if invocation.arguments else ROOT)
    if not root.is_dir():
        raise UsageError(
            f"there is no folder {root}; runs of trl ppo are in {ROOT}, unless train.run_dir says otherwise"
        )
    runs = sorted((read_run(path) for path in find_runs(root)), key=lambda run: run.changed)
    if invocation.has("json"):
        print(json.dumps([asdict(run) for run in runs], indent=2))
    elif runs:
        print(table(runs))
    else:
        print(f"no runs in {root}")
    return 0


def find_runs(root: Path) -> Iterator[Path]:
    """Run folders in a folder, itself included. Symbolic links are not followed."""

    def walk(folder: Path, depth: int) -> Iterator[Path]:
        if (folder / "events.log").is_file():  # not RunDirectory.exists, which refuses strange names
            yield folder
        elif depth:
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                    yield from walk(entry, depth - 1)

    return walk(root, _DEPTH)


def read_run(path: Path) -> Run:
    """A run's row of the table, from its files; a damaged file is noted and not fatal."""
    note, rows, summary, ending = "", [], {}, Ending(state="killed")
    try:
        summary, ending = read_summary(path), read_ending(path)
        rows = read_metrics(path)
    except (ValueError, OSError) as error:
        note = str(error)
    row = rows[-1] if rows else {}
    target = summary.get("target") or _setting(path, "train", "steps")
    return Run(
        path=str(path),
        algorithm=str(_setting(path, "algorithm", "name") or ""),
        state=ending.state,
        step=int(row.get("step", 0)),
        target=target if isinstance(target, int) else None,
        score=_number(row.get("eval/score_mean", row.get("score/mean"))),
        kl=_number(row.get("objective/kl")),
        loss=_number(_last(rows, "eval_loss", _last(rows, "loss"))),
        changed=max(entry.stat().st_mtime for entry in (path / "events.log", path / "metrics.jsonl") if entry.exists()),
        model=str(path / "model") if (path / "model").is_dir() else None,
        note=note or ending.error,
    )


def table(runs: Sequence[Run]) -> str:
    """The runs as text, a line each."""
    head = ("run", "algorithm", "state", "steps", "score", "KL", "loss", "when", "model")
    lines = [head]
    for run in runs:
        steps = f"{run.step}/{run.target}" if run.target else str(run.step)
        lines.append(
            (
                shorten(run.path, 60), shorten(run.algorithm or "-", 20), run.state, steps, _shown(run.score),
                _shown(run.kl), _shown(run.loss), _when(run.changed), shorten(run.model or "-", 60),
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{shorten(run.path, 60)}: {shorten(run.note, 160)}" for run in runs if run.note]
    return "\n".join(text)


def existing_run(name: str) -> Path:
    """The folder of a run: a path, or a name in `runs`.

    Raises:
        UsageError: if there is no run; names one that is spelled alike.
    """
    try:
        folder = run_folder(name)
        if RunDirectory.exists(folder):
            return folder
        if len(Path(name).parts) == 1 and RunDirectory.exists(name, ROOT):
            return run_folder(name, ROOT)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    parent = folder.parent if folder.parent.is_dir() and folder.parent != Path.cwd() else Path(ROOT)
    names = [path.name for path in find_runs(parent)] if parent.is_dir() else []
    near = did_you_mean(Path(name).name, names)
    if folder.is_dir() and not near:
        near = ": the folder has no events.log"
    raise UsageError([Problem(text=f"there is no run{near or ': trl runs lists them'}", where=shorten(name, 120))])


def _setting(path: Path, section: str, name: str) -> Any:
    """Returns a stored setting of a run, or None if it is missing."""
    from trl.cli.launch import stored_config

    found = stored_config(path).get(section)
    return found.get(name) if isinstance(found, dict) else None


def _last(rows: Sequence[dict[str, Any]], key: str, default: Any = None) -> Any:
    return next((row[key] for row in reversed(rows) if key in row), default)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _when(changed: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(changed))
