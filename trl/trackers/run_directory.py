"""`RunDirectory`: the folder with a run's settings, environment, metrics, completions and events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl.files import STAGING, append_line, remove, sync_folder, write_atomic
from trl.trackers.environment import differences, environment
from trl.trackers.events import event_line
from trl.trackers.findings import FILE_NAME as FINDINGS
from trl.trackers.findings import Finding, complete_findings, finding_line
from trl.trackers.lock import RunLock
from trl.trackers.metrics import complete_rows, metrics_line
from trl.trackers.paths import run_folder
from trl.trackers.plain import plain, to_json
from trl.trackers.records import CompletionRecord, has_pyarrow, step_of, write_records

logger = logging.getLogger(__name__)


class RunDirectory:
    """Folder that records a run, open for writing by a single writer. Use `create` or `open` to obtain one.

    | file | content | written |
    | --- | --- | --- |
    | `config.resolved.yaml` | all settings | atomically |
    | `environment.json` | versions, git commit, machine | atomically |
    | `metrics.jsonl` | one row of numbers per step | appended line by line |
    | `completions/step-00000012.parquet` | all samples of the step | atomically |
    | `events.log` | time-stamped events | appended line by line |
    | `findings.jsonl` | findings of the doctor, if there are any | appended line by line |
    | `summary.json` | how the run ended | atomically |
    | `checkpoints/`, `dumps/`, `model/` | files written by the caller | |

    All text is UTF-8 with secrets redacted (`trl.redaction`). Atomic writes are durable when the call returns. Appended
    lines survive a crash of the process at once, and a power loss after `sync`. All writers raise `OSError` if the disk
    is full or read-only, and never leave a partial line behind.

    Usable as a tracker (`log`, `close`) and as a context manager.
    """

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path = path
        self._lock = lock
        self._last_step: int | None = None
        self._warned_parquet = False

    # Opening ---------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, root: str | Path | None = None) -> RunDirectory:
        """Starts a run in a new or empty folder.

        Args:
            path: run folder; missing parents are created.
            root: if given, `path` must be inside it (see `trl.trackers.paths.run_folder`).

        Raises:
            ValueError: if the folder is not empty, or `path` is not allowed.
            RunLocked: if another process is starting a run there.
        """
        folder = run_folder(path, root)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, not a run folder")
        folder.mkdir(parents=True, exist_ok=True)
        _check_new(folder)
        run = cls(folder, RunLock(folder / ".lock"))
        try:
            _check_new(folder)  # again: another process may have held the lock until now
            run._remove_temporary_files()
            for name in ("completions", "checkpoints"):
                (folder / name).mkdir(exist_ok=True)
            write_atomic(folder / "environment.json", (to_json(environment(), indent=2) + "\n").encode())
            write_atomic(folder / "metrics.jsonl", b"")
            run.event("run created")
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: str | Path, root: str | Path | None = None) -> RunDirectory:
        """Opens an existing run to continue it, removing partial writes of a killed process.

        Call `truncate_after` next.

        Args:
            path: run folder.
            root: as in `create`; entries of the run folder must not be symbolic links that lead out of it, either.

        Raises:
            ValueError: if there is no run, or `path` is not allowed.
            RunLocked: if another process is writing the run.
        """
        folder = run_folder(path, root)
        if not cls.exists(folder):
            raise ValueError(f"{folder} is not a run folder: it contains no events.log")
        if root is not None:
            for entry in folder.iterdir():
                if not entry.resolve().is_relative_to(folder):
                    raise ValueError(f"{entry} is a symbolic link that leads out of the run folder")
        run = cls(folder, RunLock(folder / ".lock"))
        try:
            run._remove_temporary_files()
            run._truncate_partial_lines()
            run._update_environment()
            previous = run._lock.unreleased_by
            run.event("run opened" + (f"; {previous} ended without closing it" if previous else ""))
            for name in ("completions", "checkpoints"):
                run._recreate_folder(name)
        except BaseException:
            run.close()
            raise
        return run

    @staticmethod
    def exists(path: str | Path, root: str | Path | None = None) -> bool:
        """Whether `path` holds a run that can be opened."""
        return (run_folder(path, root) / "events.log").is_file()

    @property
    def checkpoints(self) -> Path:
        """Checkpoint folder."""
        return self.path / "checkpoints"

    @property
    def last_step(self) -> int | None:
        """Step of the last metrics row; None if there is none."""
        return self._last_step

    # Writing ---------------------------------------------------------------------------------------------------------

    def write_config(self, config: Any) -> None:
        """Writes `config.resolved.yaml`.

        Args:
            config: a dataclass or mapping; its values are converted by `trl.trackers.plain.plain`.
        """
        import yaml

        text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
        write_atomic(self.path / "config.resolved.yaml", text.encode("utf-8"))

    def read_config(self) -> Any:
        """Reads back `config.resolved.yaml`; see `read_config`."""
        return read_config(self.path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, the outcome of the run."""
        write_atomic(self.path / "summary.json", (to_json(summary, indent=2) + "\n").encode())

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Appends the numbers of `row` to `metrics.jsonl` (see `trl.trackers.metrics.metrics_line`).

        Args:
            row: statistics by name. Prefix times and speeds with `time/` and memory with `memory/`; only these may
                differ between runs with the same seed.
            step: step number, higher than in all previous rows.

        Raises:
            ValueError: if there already is a row for this or a later step.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"metrics.jsonl already has a row for step {self._last_step}; step {step} must be higher")
        append_line(self.path / "metrics.jsonl", metrics_line(row, step))
        self._last_step = step

    def log_completions(self, records: Sequence[CompletionRecord], step: int) -> None:
        """Writes the samples of a step into `completions/` (see `trl.trackers.records.write_records`)."""
        if not self._warned_parquet and not has_pyarrow():
            self._warned_parquet = True
            logger.warning("pyarrow is not installed: completions are written as .jsonl (pip install pyarrow)")
            self.event("completions are written as .jsonl, since pyarrow is not installed")
        self._recreate_folder("completions")
        write_records(self.path / "completions", step, records)

    def event(self, text: str) -> None:
        """Appends a UTC time stamp and text to `events.log` (see `trl.trackers.events.event_line`)."""
        append_line(self.path / "events.log", event_line(text))

    def finding(self, finding: Finding) -> None:
        """Appends a finding to `findings.jsonl`."""
        append_line(self.path / FINDINGS, finding_line(finding))

    def sync(self) -> None:
        """Flushes all appended lines to disk. Call it before publishing a checkpoint that relies on them."""
        for name in ("metrics.jsonl", "events.log", FINDINGS):
            if name == FINDINGS and not (self.path / name).exists():
                continue
            descriptor = os.open(self.path / name, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    # Resuming and closing --------------------------------------------------------------------------------------------

    def truncate_after(self, step: int, last_row: int | None = None) -> tuple[int, int]:
        """Removes everything recorded after a step, so that a resumed run does not record it twice.

        Rows up to `step` stay byte-identical. The summary is removed as well, since the run is not over.

        Args:
            step: last step to keep, i.e. that of the checkpoint; -1 removes everything.
            last_row: step of the last row that the checkpoint relies on; None: `step` itself.

        Returns:
            Numbers of metrics rows and completion files removed.

        Raises:
            ValueError: if `metrics.jsonl` is damaged before its end; names file and line.
        """
        path = self.path / "metrics.jsonl"
        data = path.read_bytes() if path.exists() else b""
        rows = complete_rows(path, data)
        kept_rows = [(row["step"], end) for row, end in rows if row["step"] <= step]
        kept_bytes = kept_rows[-1][1] if kept_rows else 0
        if kept_bytes != len(data) or not path.exists():
            write_atomic(path, data[:kept_bytes])
        files = [entry for entry in self._completion_files() if (step_of(entry) or 0) > step]
        for entry in files:
            entry.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)
        self._truncate_findings(step)
        self._last_step = kept_rows[-1][0] if kept_rows else None
        removed = len(rows) - len(kept_rows)
        if removed or files:
            self.event(f"removed the records after step {step}: {removed} metrics rows, {len(files)} completion files")
        expected = step if last_row is None else last_row
        if expected > 0 and self._last_step != expected:
            last = "none" if self._last_step is None else str(self._last_step)
            text = f"is incomplete: expected rows up to step {expected}; the last step in it is {last}"
            logger.warning("%s %s", path, text)
            self.event(f"metrics.jsonl {text}")
        return removed, len(files)

    def close(self) -> None:
        """Releases the write lock; further calls do nothing."""
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recreate_folder(self, name: str) -> None:
        """Recreates a subfolder that was deleted, and logs that its content is lost."""
        if not (self.path / name).is_dir():
            (self.path / name).mkdir()  # no parents: a missing run folder is an error
            sync_folder(self.path)
            text = f"{name}/ was deleted along with its contents; recreating it"
            logger.warning("%s: %s", self.path, text)
            self.event(text)

    def _truncate_findings(self, step: int) -> None:
        """Removes the findings after a step; of a run that starts over, all, since its settings may be other ones."""
        path = self.path / FINDINGS
        data = path.read_bytes() if path.exists() else b""
        kept = b"".join(line for finding, line in complete_findings(data) if step > 0 and finding.step <= step)
        if kept != data:
            write_atomic(path, kept)

    def _completion_files(self) -> list[Path]:
        folder = self.path / "completions"
        return sorted(entry for entry in folder.iterdir() if step_of(entry) is not None) if folder.is_dir() else []

    def _remove_temporary_files(self) -> None:
        """Removes temporary files of a killed process, left by `write_atomic` or by saving a model."""
        for folder in (self.path, self.path / "completions", self.path / "dumps"):
            if folder.is_dir():
                for entry in folder.glob(f"{STAGING}*"):
                    remove(entry)

    def _truncate_partial_lines(self) -> None:
        """Removes incomplete last lines from the appended files and determines the last step."""
        metrics, events = self.path / "metrics.jsonl", self.path / "events.log"
        data = metrics.read_bytes() if metrics.exists() else b""
        rows = complete_rows(metrics, data)
        self._last_step = rows[-1][0]["step"] if rows else None
        complete_bytes = rows[-1][1] if rows else 0
        if complete_bytes != len(data) or not metrics.exists():
            write_atomic(metrics, data[:complete_bytes])
        data = events.read_bytes()
        complete_bytes = data.rfind(b"\n") + 1
        if complete_bytes != len(data):
            write_atomic(events, data[:complete_bytes])

    def _update_environment(self) -> None:
        """Rewrites `environment.json` and logs the changes as events."""
        path, now = self.path / "environment.json", to_json(environment(), indent=2) + "\n"
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(before, dict):
                raise ValueError(f"expected a mapping, found a {type(before).__name__}")
        except ValueError as error:
            text = f"environment.json cannot be read and will be rewritten, so changes since then are unknown: {error}"
            logger.warning("%s: %s", self.path, text)
            self.event(text)
            before = json.loads(now)
        for line in differences(before, json.loads(now)):
            self.event(f"environment changed: {line}")
        write_atomic(path, now.encode())


def read_config(folder: str | Path) -> Any:
    """Reads `config.resolved.yaml` of a run folder as plain data; None if it does not exist.

    Raises:
        ValueError: if the file is not valid YAML, or has an alias, which `write_config` never writes and a few of which
            can stand for gigabytes; names the file and the position.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
            return super().compose_node(parent, index)

    path = Path(folder) / "config.resolved.yaml"
    try:
        if not path.exists():
            return None
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class NullRunDirectory:
    """`RunDirectory` stand-in that writes nothing, for runs without a folder and for ranks other than the main one."""

    def write_config(self, config: Any) -> None:
        """Does nothing."""

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Does nothing."""

    def log_completions(self, records: Sequence[CompletionRecord], step: int) -> None:
        """Does nothing."""

    def event(self, text: str) -> None:
        """Does nothing."""

    def finding(self, finding: Finding) -> None:
        """Does nothing."""

    def sync(self) -> None:
        """Does nothing."""

    def truncate_after(self, step: int, last_row: int | None = None) -> tuple[int, int]:
        """Removes nothing; returns (0, 0)."""
        return 0, 0

    def close(self) -> None:
        """Does nothing."""


def _check_new(folder: Path) -> None:
    """Checks that a folder is empty, apart from leftovers of a `create` that was killed before its first event.

    Raises:
        ValueError: if it holds anything else.
    """
    if contents := sorted(entry.name for entry in folder.iterdir() if not _is_leftover(entry)):
        problem = (
            "already holds a run: resume it"
            if "events.log" in contents
            else f"is not empty ({contents[0]}, ...): empty it"
        )
        raise ValueError(f"{folder} {problem} or choose another folder")


def _is_leftover(entry: Path) -> bool:
    """Whether `entry` may be left over from a `create` that was killed before its first event."""
    if entry.name == ".lock" or entry.name.startswith(STAGING):
        return True
    if entry.name in ("completions", "checkpoints"):
        return entry.is_dir() and not any(entry.iterdir())
    if entry.name == "metrics.jsonl":
        return entry.is_file() and entry.stat().st_size == 0
    return entry.name == "environment.json" and not (entry.parent / "events.log").exists()
