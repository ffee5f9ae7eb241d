"""How a run was started, as `config.resolved.yaml` keeps it: `trl resume` needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl.cli import places
from trl.cli.catalogue import STAGES
from trl.cli.problems import Problem, UsageError
from trl.cli.resolve import DEFAULT, Collector, Resolved
from trl.cli.yaml_nodes import Document
from trl.redaction import REDACTED, redact
from trl.trackers import read_config

CONFIG = "config.resolved.yaml"
_KEY = "launch"


def record(command: str, resolved: Resolved, files: Mapping[str, str]) -> dict[str, Any]:
    """Builds the record that `trl resume` reads.

    Args:
        command: "ppo", "grpo" or an offline stage.
        resolved: settings, with absolute paths.
        files: SHA-256 of the files that hold rewards or rows, by path.
    """
    return {
        "command": command,
        "folder": os.getcwd(),
        "settings": resolved.nested(),
        "sources": dict(resolved.sources),
        "files": dict(files),
    }


def stored_config(run: Path) -> dict[str, Any]:
    """The contents of a run's `config.resolved.yaml`; empty if it is missing or cannot be read."""
    try:
        found = read_config(run)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def command_of_run(name: str) -> str | None:
    """The command that started a run, given as a path or a name in `runs`; None if there is no such run."""
    for folder in (Path(name), Path("runs") / name):
        found = stored_config(folder).get(_KEY) if "\0" not in name else None
        if isinstance(found, dict):
            return str(found.get("command", "ppo"))
    return None


class Launch:
    """The start of a run, read back.

    Raises:
        UsageError: if the run was not started by this command line, or its record cannot be read.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        stored = stored_config(run).get(_KEY)
        if not isinstance(stored, dict):
            raise UsageError(
                [Problem(
                    text="it was started from Python: run its script again, with train(resume='auto'), or for an "
                    "offline stage train(resume_from_checkpoint='auto')",
                    where=f"{run / CONFIG}",
                )]
            )  # fmt: skip
        self.command = str(stored.get("command", "ppo"))
        self.folder = str(stored.get("folder", "."))
        self.files: dict[str, str] = dict(stored.get("files") or {})
        self._sources: dict[str, str] = dict(stored.get("sources") or {})
        self._collector = Collector(self.command)
        self._collector.add_document(_sections(run / CONFIG, stored))

    def resolved(self, environment: Mapping[str, str], flags: Any) -> Resolved:
        """The run's settings, under those of the environment and the flags.

        Raises:
            UsageError: if they are invalid, or a secret is needed that the run does not keep.
        """
        collector = self._collector
        for path, given in collector.given.items():
            source = self._sources.get(path, given.source)
            collector.given[path] = replace(given, source=source, line="")
        stored = dict(collector.given)
        collector.add_environment(environment)
        collector.add_flags(flags)
        missing = [
            Problem(text=f"{path} was a secret, which a run does not keep: give it again", where=str(self.run / CONFIG))
            for path, given in collector.given.items()
            if REDACTED in repr(given.value)
        ]
        if missing:
            raise UsageError(missing)
        collector.given = {
            path: given
            for path, given in collector.given.items()
            if not (path in stored and given is stored[path] and given.source == DEFAULT)
        }
        resolved = collector.resolved(self.command)
        # What was a default when the run began stays what it was, should a later version have another.
        values = {path: given.value for path, given in stored.items() if path not in collector.given}
        return Resolved({**resolved.values, **values}, resolved.sources, resolved.given, resolved.command)

    def check_files(self, resolved: Resolved, given_anew: bool) -> None:
        """Checks that the files of the run's rewards, or of an offline stage's rows, are those that it began with.

        Args:
            resolved: settings to resume with.
            given_anew: the reward or the rows were given anew, so they may have changed.

        Raises:
            UsageError: if one is gone or has changed.
        """
        for path, digest in {} if given_anew else self.files.items():
            file = Path(path)
            if self.command in STAGES:
                what, flag = "file of rows", f"--data {resolved['data.dataset']}"
            else:
                what = "reward's file"
                flag = " ".join(f"--reward {name}={source}" for name, source in resolved["reward.functions"].items())
            if not file.is_file():
                raise UsageError(f"the {what} {path} is gone: put it back, or say where it is now, with {flag}")
            if places.digest(file) != digest:
                raise UsageError(
                    f"the {what} {path} has changed since the run began: put it back, or go on with the changed one, "
                    f"with {flag}"
                )


def changes(before: Resolved, after: Resolved) -> list[str]:
    """Lines for the settings that differ."""
    return [
        f"{path}: {redact(before[path])!r} -> {redact(value)!r} ({after.sources[path]})"
        for path, value in after.values.items()
        if before[path] != value
    ]


def _sections(path: Path, stored: Mapping[str, Any]) -> Document:
    """The stored settings as a document with sections."""
    import yaml

    return Document(yaml.safe_dump(stored.get("settings") or {}, sort_keys=False, allow_unicode=True), str(path))
