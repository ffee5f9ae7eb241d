"""Writes a run's settings, rows, events and summary into its folder, and handles disk errors."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl import files
from trl.runs.options import OnDiskError
from trl.state.checkpoints import CheckpointError, sweep
from trl.trackers import (
    CompletionRecord,
    Finding,
    NullRunDirectory,
    RunDirectory,
    read_findings,
    read_metrics,
    run_folder,
    without_times,
)
from trl.trackers.environment import differences
from trl.trackers.plain import plain
from trl.training.processes import run_together

logger = logging.getLogger(__name__)

_MAX_PENDING_ROWS = 1000  # rows held back by disk errors
_SAVED_EVENT = re.compile(r"\S+ checkpoint of step (\d+) saved in ")  # the line of `saved`, with its time stamp


class Recorder:
    """Writes a run's records on the main process and reports success or failure to all processes.

    Without a run folder, writes nothing. Every process must call the same methods in the same order, except for `event`.

    Args:
        accelerator: spans all processes.
        run_dir: run folder; None for none.
        resume: False: there must be no run in the folder; True: there must be one; "auto": either.
        on_disk_error: what to do about a full or read-only disk.
        argument: the caller's argument that `resume` came from, for messages.

    Raises:
        ValueError: if the folder does or does not hold a run, against `resume`.
        RunLocked: if another process is writing the run.
    """

    def __init__(
        self,
        accelerator: Any,
        run_dir: str | Path | None,
        *,
        resume: Any,
        on_disk_error: OnDiskError = "stop",
        argument: str = "resume",
    ) -> None:
        self._accelerator = accelerator
        self._resume, self._argument = resume, argument
        self._on_disk_error = on_disk_error
        self.path = None if run_dir is None else run_folder(run_dir)
        self.disk_errors = 0
        self.last_step: int | None = None
        """Step of the newest checkpoint."""
        self._begun = False
        self._pending_rows: list[tuple[int, Mapping[str, Any], Sequence[CompletionRecord]]] = []
        self._pending_lines: list[Callable[[], None]] = []
        self._run: RunDirectory | NullRunDirectory = run_together(accelerator, self._open, ValueError)

    def _open(self) -> RunDirectory | NullRunDirectory:
        if self.path is None or not self._accelerator.is_main_process:
            return NullRunDirectory()
        exists = RunDirectory.exists(self.path)
        if exists and self._resume is False:
            raise ValueError(
                f"{self.path} already contains a run: pass {self._argument}='auto' to continue it, choose another folder, or "
                "remove it"
            )
        if not exists and self._resume is True:
            raise ValueError(
                f"{self._argument}=True, but {self.path} contains no run; {self._argument}='auto' would start one"
            )
        if not exists:
            return RunDirectory.create(self.path)
        run = RunDirectory.open(self.path)
        sweep(run.checkpoints)
        return run

    @property
    def checkpoints(self) -> Path | None:
        """Checkpoint folder; None if the run has no folder."""
        return None if self.path is None else self.path / "checkpoints"

    def begin(self, step: int, checkpoint: Path | None, config: Mapping[str, Any], last_row: int | None = None) -> None:
        """Removes records after `step`, where the run starts or resumes from `checkpoint`, and writes the settings.

        Args:
            step: step of the checkpoint, or 0.
            checkpoint: the checkpoint; None starts the run.
            config: settings by section.
            last_row: step of the last row before the checkpoint; None: every step has one.

        Raises:
            ValueError: if the run has records but no checkpoint, unless it was stopped before its first checkpoint and
                `resume="auto"` may start it over.
        """
        self.last_step = None if checkpoint is None else step
        run = self._run
        if checkpoint is None:
            run_together(self._accelerator, self._check_nothing_is_lost, ValueError)

        def write() -> None:
            run.truncate_after(step, last_row)
            if isinstance(run, RunDirectory):
                for line in self._changed_settings(run, config):
                    run.event(line)
            run.write_config(config)

        run_together(self._accelerator, write, OSError)
        self._begun = True

    def _check_nothing_is_lost(self) -> None:
        """Refuses to start a run over if that would delete records that belong to a lost checkpoint."""
        run = self._run
        if not isinstance(run, RunDirectory):
            return
        lines = (run.path / "events.log").read_text(encoding="utf-8", errors="replace").splitlines()
        saved_steps = [match[1] for line in lines if (match := _SAVED_EVENT.match(line))]
        if not saved_steps and (run.last_step is None or self._resume == "auto"):
            return
        records = "no records" if run.last_step is None else f"records up to step {run.last_step}"
        if saved_steps:
            hint = f"the last one was of step {saved_steps[-1]}: restore it, remove the folder, or choose another one"
        else:
            hint = (
                f"the run was stopped before its first: {self._argument}='auto' would delete the records and start over"
            )
        raise ValueError(
            f"{self._argument}={self._resume!r}: {run.path} has {records} but no checkpoint to resume from; {hint}"
        )

    def _changed_settings(self, run: RunDirectory, config: Mapping[str, Any]) -> list[str]:
        """Event lines for the settings that differ from the run so far."""
        try:
            before = run.read_config()
            if not isinstance(before, dict | None):
                raise ValueError(
                    f"{run.path}/config.resolved.yaml contains a {type(before).__name__}, not a mapping of settings"
                )
        except ValueError as error:
            message = (
                f"previous settings cannot be read, so changes to them are unknown; the file is rewritten: {error}"
            )
            logger.warning("%s", message)
            return [message]
        if before is None:
            return []
        now = plain(config)
        for settings in (before, now):
            settings.pop("launch", None)  # repeats the other sections
        changes = differences(before, now)
        return [f"setting changed: {change}" for change in changes]

    # Records ---------------------------------------------------------------------------------------------------------

    def event(self, text: str) -> None:
        """Appends a line to events.log; if the disk fails, it is written with the next records."""
        self._append(lambda: self._run.event(text))

    def failed(self, step: int, error: Exception, *, target: int) -> None:
        """Notes the exception that ended the run in a step, or kept it from beginning, which leaves the run as it was.

        Args:
            step: step that was under way; of a run that has all its steps, the one after them.
            error: the exception.
            target: steps of the run.
        """
        during = f"in step {step}" if step <= target else f"after step {target}"
        what = f"failed {during}" if self._begun else "could not begin"
        self.event(f"{what}: {type(error).__name__}: {error}")

    def finding(self, finding: Finding) -> None:
        """Appends a line to findings.jsonl, like `event`."""
        self._append(lambda: self._run.finding(finding))

    def findings(self) -> list[Finding]:
        """Findings on disk; [] on other processes than the main one and without a run folder."""
        return read_findings(self._run.path) if isinstance(self._run, RunDirectory) else []

    def rows(self) -> list[dict[str, Any]]:
        """Metrics rows on disk; [] on other processes than the main one and without a run folder."""
        return read_metrics(self._run.path) if isinstance(self._run, RunDirectory) else []

    def _append(self, write: Callable[[], None]) -> None:
        if isinstance(self._run, RunDirectory):
            self._pending_lines.append(write)
            try:
                self._write_lines()
            except OSError as error:
                logger.warning("an event could not be written, will retry with the next records: %s", error)

    def record(self, step: int, row: Mapping[str, Any], records: Sequence[CompletionRecord] = ()) -> None:
        """Writes the metrics row and the samples of a step, if there are any.

        Raises:
            OSError: if they cannot be written and disk errors stop the run.
        """
        self._pending_rows.append((step, row, records))
        if len(self._pending_rows) > _MAX_PENDING_ROWS:
            self._on_disk_error = "stop"  # memory is finite, and no row may be dropped
        self._attempt(self._write_records, f"the records of step {step}")

    def _write_lines(self) -> None:
        while self._pending_lines:
            self._pending_lines[0]()
            del self._pending_lines[0]

    def _write_records(self) -> None:
        self._write_lines()
        while self._pending_rows:
            step, row, records = self._pending_rows[0]
            if records:
                self._run.log_completions(records, step)
            self._run.log(row, step)
            del self._pending_rows[0]

    def sync(self, step: int) -> bool:
        """Writes pending records and flushes them to the disk, before a checkpoint that relies on them.

        Returns:
            Whether that succeeded.

        Raises:
            OSError: if it failed and disk errors stop the run.
        """

        def write() -> None:
            self._write_records()
            self._run.sync()

        return self._attempt(write, f"the records up to step {step}")

    def saved(self, step: int, seconds: float) -> None:
        """Notes that the checkpoint of a step is complete."""
        self.last_step = step
        self.event(f"checkpoint of step {step} saved in {seconds:.2f} s")

    def _attempt(self, work: Callable[[], Any], description: str) -> bool:
        """Runs `work` and returns whether it succeeded, on every process.

        Raises:
            OSError: if it failed and disk errors stop the run; or CheckpointError.
        """
        try:
            run_together(self._accelerator, work, OSError)
        except (OSError, CheckpointError) as error:
            if self._on_disk_error == "stop":
                raise
            self.disk_errors += 1
            logger.warning("%s could not be written, will retry: %s", description, error)
            return False
        return True

    # The end ---------------------------------------------------------------------------------------------------------

    def insist(self, work: Callable[[], bool], waits: Sequence[float] = (0.1, 1.0)) -> None:
        """Runs work that the end of a run requires, retrying on disk errors; the last failure raises."""
        for wait in waits:
            if work():
                return
            time.sleep(wait)
        self._on_disk_error = "stop"
        work()

    def finish(self, summary: Mapping[str, Any], *, save_model: Callable[[Path], Any] | None) -> None:
        """Writes the summary, including the run's last row, and the model in transformers format.

        Args:
            summary: how the run ended.
            save_model: writes the model into a folder; None writes none.
        """

        def write() -> None:
            self._write_records()
            if save_model is not None and isinstance(self._run, RunDirectory):
                _write_model(self._run.path, save_model)
            self._run.write_summary(
                {**summary, "run/disk_errors": self.disk_errors, "metrics": without_times(self._last_row())}
            )

        self.insist(lambda: self._attempt(write, "model and summary"))

    def _last_row(self) -> Mapping[str, Any]:
        """Last metrics row on disk, which an earlier `train` call wrote if this one resumed after the final step."""
        rows = self.rows()
        return rows[-1] if rows else {}

    def insist_on_event(self, text: str) -> None:
        """Writes an event, retrying on disk errors like `insist`."""
        self.event(text)
        self.insist(lambda: self._attempt(self._write_lines, "an event"))

    def close(self) -> None:
        """Releases the run's write lock."""
        self._run.close()


def _write_model(folder: Path, save: Callable[[Path], Any]) -> None:
    """Saves the model to `folder/model`. An old one is moved aside first: folders cannot be replaced atomically."""
    from safetensors import SafetensorError

    staging, target = folder / f"{files.STAGING}final", folder / "model"
    if staging.exists():
        files.remove(staging)
    try:
        save(staging / "model")
    except SafetensorError as error:  # safetensors' wrapper for disk errors
        files.remove(staging)
        raise OSError(f"the model could not be written to {folder}: {error}") from error
    except OSError:
        if staging.exists():
            files.remove(staging)
        raise
    files.sync_tree(staging / "model")
    if target.exists():
        files.move(target, staging / "before")
    files.move(staging / "model", target)
    files.remove(staging)
