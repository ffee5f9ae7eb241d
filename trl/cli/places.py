"""Names of models, prompts and run folders, checked before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import get_args

import trl.assets
from trl.cli.catalogue import STAGES
from trl.cli.problems import Problem, UsageError, did_you_mean
from trl.cli.resolve import Resolved
from trl.trackers import RunDirectory, run_folder

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")  # `trl.data.readers` has them too, and imports torch

EMBEDDED_PROMPTS = "review-openings"
EMBEDDED_MODELS: tuple[str, ...] = get_args(trl.assets.Name)
_MODEL = {"model.name": "a folder, a hub id or tiny-gpt2-reviews (--model)"}
_STAGE_REQUIRED = {
    **_MODEL,
    "data.dataset": "a file of rows or a hub id (--data)",
}
_REQUIRED = {
    **_MODEL,
    "data.prompts": f"a file of prompts or {EMBEDDED_PROMPTS} (--prompts)",
    "reward.functions": "file.py:function, classifier:MODEL ... (--reward)",
}


def place_of(name: str) -> str:
    """Folder of an embedded model, or the name itself."""
    return trl.assets.path(name) if name in EMBEDDED_MODELS else name  # type: ignore[arg-type]


def check(resolved: Resolved, *, trains: bool = True) -> None:
    """Checks that everything required is given and that files exist.

    Args:
        resolved: settings.
        trains: whether the command trains, and so needs to know for how long.

    Raises:
        UsageError: names everything that is missing.
    """
    stage = resolved.command in STAGES
    required = _STAGE_REQUIRED if stage else _REQUIRED
    problems = [Problem(text=f"{path} is missing: {what}") for path, what in required.items() if not resolved[path]]
    if trains and not stage and resolved["train.steps"] is None and resolved["train.episodes"] is None:
        problems.append(Problem(text="train.steps is missing: the number of steps (--steps), or train.episodes"))
    for path in data_settings(resolved):
        name = resolved[path]
        if name is not None and not _may_exist(name, stage=stage):
            problems.append(Problem(text=f"there is no file {name}{_near_file(name)}", where=resolved.place(path)))
    for path in _model_settings(resolved):
        name = resolved[path]
        near = difflib.get_close_matches(name or "", EMBEDDED_MODELS, n=1, cutoff=0.8)
        if near and name not in EMBEDDED_MODELS and not Path(name).exists():
            problems.append(
                Problem(text=f"there is no model {name}: did you mean {near[0]}?", where=resolved.place(path))
            )
    if problems:
        raise UsageError(problems)


def with_run_folder(resolved: Resolved, default: str, *, free: bool = True) -> Resolved:
    """The settings with the run's folder, made absolute, in `train.run_dir`.

    Args:
        resolved: settings.
        default: name of the run if it has none.
        free: check that no run and no other files are in it.

    Raises:
        UsageError: if the name leads out of its root, or the folder holds a run or other files.
    """
    named, path = resolved["train.run_name"], resolved["train.run_dir"]
    setting = "train.run_dir" if path is not None else "train.run_name"
    try:
        folder = run_folder(path) if path is not None else run_folder(named or default, resolved["train.root"])
        is_run = RunDirectory.exists(folder)
        occupied = not is_run and folder.exists() and (not folder.is_dir() or _holds_files(folder))
    except (ValueError, OSError) as error:
        raise UsageError([Problem(text=f"{setting}: {error}", where=resolved.place(setting))]) from error
    shown = shown_path(folder)
    if free and is_run:
        raise UsageError(
            f"{shown} already holds a run: trl resume {shown} goes on with it; --run-dir or --run-name chooses another "
            "folder"
        )
    if free and occupied:
        raise UsageError(f"{shown} is not an empty folder: --run-dir or --run-name chooses another one")
    return resolved.with_value("train.run_dir", str(folder), resolved.sources[setting]).with_value(
        "train.run_name", None, resolved.sources["train.run_name"]
    )


def with_absolute_paths(resolved: Resolved) -> Resolved:
    """The settings with absolute paths of files, so that a run can be resumed from any folder."""
    changed = dict(resolved.values)
    for path in (*data_settings(resolved), *_model_settings(resolved)):
        name = changed[path]
        if name is not None and name not in (EMBEDDED_PROMPTS, *EMBEDDED_MODELS) and Path(name).exists():
            changed[path] = str(Path(name).resolve())
    if "reward.functions" in changed:
        changed["reward.functions"] = {
            name: _absolute_source(source) for name, source in changed["reward.functions"].items()
        }
    return replace(resolved, values=changed)


def data_settings(resolved: Resolved) -> tuple[str, ...]:
    """The settings that name files of prompts or rows."""
    stage = resolved.command in STAGES
    return ("data.dataset", "data.eval_dataset") if stage else ("data.prompts", "data.eval_prompts")


def _model_settings(resolved: Resolved) -> list[str]:
    return [path for path in ("model.name", "model.reference", "model.tokenizer") if path in resolved.values]


def _may_exist(name: str, *, stage: bool) -> bool:
    """Whether a name of data is a file or an embedded set; for an offline stage, or may be a folder or a hub id."""
    if Path(name).is_file():
        return True
    return Path(name).suffix.lower() not in SUFFIXES if stage else name == EMBEDDED_PROMPTS


def file_digests(resolved: Resolved) -> dict[str, str]:
    """SHA-256 of the files of an offline stage's rows, by absolute path."""
    names = [resolved[path] for path in data_settings(resolved)]
    paths = [Path(name).resolve() for name in names if name is not None and Path(name).is_file()]
    return {str(path): digest(path) for path in paths}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def shown_path(path: Path) -> str:
    """A path as the user would type it: relative to the current folder if it is in it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) and path != Path.cwd() else str(path)


def _holds_files(folder: Path) -> bool:
    """Whether a folder holds more than what a killed start of a run leaves (`RunDirectory.create` looks closer)."""
    return any(not entry.name.startswith(".") and entry.name not in _LEFT_OVER for entry in folder.iterdir())


_LEFT_OVER = ("completions", "checkpoints", "environment.json", "metrics.jsonl")


def _absolute_source(source: str) -> str:
    kind, colon, rest = source.partition(":")
    if kind == "classifier" and colon and rest not in EMBEDDED_MODELS and Path(rest).is_dir():
        return f"{kind}:{Path(rest).resolve()}"
    file, colon, function = source.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file.endswith(".py") else source


def _near_file(name: str) -> str:
    folder = Path(name).parent
    names = [str(path) for path in folder.iterdir()] if folder.is_dir() else []
    return did_you_mean(name, [EMBEDDED_PROMPTS, *names])
