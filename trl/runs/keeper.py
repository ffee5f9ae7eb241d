"""Writes a managed run's records and checkpoints, and handles disk errors."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from trl import files
from trl.runs.options import OnDiskError, TrainOptions
from trl.state.checkpoints import CheckpointError, best_name, sweep
from trl.state.tensorfile import safetensors_pieces
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
from trl.training.guards import SkippedUpdate
from trl.training.processes import run_together, share_json
from trl.training.resume import save_training
from trl.training.run_state import Learner
from trl.types import Experience, Rollout

logger = logging.getLogger(__name__)

_MAX_PENDING_ROWS = 1000  # rows held back by disk errors
_MAX_DUMPS = 20  # skipped minibatches dumped per call to `train`
_SAVE_INTERVAL_FACTOR = 125  # save interval in save durations; with the early first save, still under 1% of an hour
_MAX_SAVE_INTERVAL = 1800.0  # maximum seconds between checkpoints
_FIRST_SAVE_INTERVAL = 60.0  # seconds to the first checkpoint, while the duration of a save is still unknown
_SAVED_EVENT = re.compile(
    r"\S+ checkpoint of step (\d+) saved in "
)  # event line that `save` writes, with its time stamp


class Keeper:
    """Writes a run's records and checkpoints on the main process and reports success or failure to all processes.

    Without a run folder, writes nothing. Every process must call the same methods in the same order, except for `event`
    and `dump`.
    """

    def __init__(self, trainer: Learner, options: TrainOptions, save_every: int | None) -> None:
        self._trainer = trainer
        self._options = options
        self._on_disk_error: OnDiskError = options.on_disk_error
        self._save_every = save_every
        self.path = None if options.run_dir is None else run_folder(options.run_dir)
        self.disk_errors = 0
        self.last_step: int | None = None
        """Step of the newest checkpoint."""
        self._last_path: Path | None = None
        self._pending_rows: list[tuple[int, Mapping[str, Any], Sequence[CompletionRecord]]] = []
        self._pending_lines: list[Callable[[], None]] = []
        self._dump_count = 0
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        self._run: RunDirectory | NullRunDirectory = run_together(trainer.accelerator, self._open, ValueError)

    def _open(self) -> RunDirectory | NullRunDirectory:
        if self.path is None or not self._trainer.accelerator.is_main_process:
            return NullRunDirectory()
        exists = RunDirectory.exists(self.path)
        if exists and self._options.resume is False:
            raise ValueError(
                f"{self.path} already contains a run: pass resume='auto' to continue it, choose another folder, or remove it"
            )
        if not exists and self._options.resume is True:
            raise ValueError(f"resume=True, but {self.path} contains no run; resume='auto' would start one")
        if not exists:
            return RunDirectory.create(self.path)
        run = RunDirectory.open(self.path)
        sweep(run.checkpoints)
        return run

    @property
    def checkpoints(self) -> Path | None:
        """Checkpoint folder; None if the run has no folder."""
        return None if self.path is None else self.path / "checkpoints"

    def begin(self, step: int, checkpoint: Path | None, config: Mapping[str, Any]) -> None:
        """Removes records after `step`, where the run starts or resumes from `checkpoint`, and writes the settings.

        Raises:
            ValueError: if the run has records but no checkpoint, unless it was stopped before its first checkpoint and
                `resume="auto"` may start it over.
        """
        self.last_step, self._last_path = (None if checkpoint is None else step), checkpoint
        run = self._run
        if checkpoint is None:
            run_together(self._trainer.accelerator, self._check_nothing_is_lost, ValueError)

        def write() -> None:
            run.truncate_after(step)
            if isinstance(run, RunDirectory):
                for line in self._changed_settings(run, config):
                    run.event(line)
            run.write_config(config)

        run_together(self._trainer.accelerator, write, OSError)

    def _check_nothing_is_lost(self) -> None:
        """Refuses to start a run over if that would delete records that belong to a lost checkpoint."""
        run = self._run
        if not isinstance(run, RunDirectory):
            return
        lines = (run.path / "events.log").read_text(encoding="utf-8", errors="replace").splitlines()
        saved_steps = [match[1] for line in lines if (match := _SAVED_EVENT.match(line))]
        if not saved_steps and (run.last_step is None or self._options.resume == "auto"):
            return
        records = "no records" if run.last_step is None else f"records up to step {run.last_step}"
        if saved_steps:
            hint = f"the last one was of step {saved_steps[-1]}: restore it, remove the folder, or choose another one"
        else:
            hint = "the run was stopped before its first: resume='auto' would delete the records and start over"
        raise ValueError(
            f"resume={self._options.resume!r}: {run.path} has {records} but no checkpoint to resume from; {hint}"
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

    def record(self, step: int, row: Mapping[str, Any], records: Sequence[CompletionRecord]) -> None:
        """Writes the metrics row and the samples of a step.

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
            self._run.log_completions(records, step)
            self._run.log(row, step)
            del self._pending_rows[0]

    def _attempt(self, work: Callable[[], Any], description: str) -> bool:
        """Runs `work` and returns whether it succeeded, on every process.

        Raises:
            OSError: if it failed and disk errors stop the run; or CheckpointError.
        """
        try:
            run_together(self._trainer.accelerator, work, OSError)
        except (OSError, CheckpointError) as error:
            if self._on_disk_error == "stop":
                raise
            self.disk_errors += 1
            logger.warning("%s could not be written, will retry: %s", description, error)
            return False
        return True

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step.

        If saves are timed by the clock, processes may disagree; the main process decides.
        """
        if self.path is None:
            return False
        if self._save_every is not None:
            return step % self._save_every == 0
        interval = min(_SAVE_INTERVAL_FACTOR * self._save_seconds, _MAX_SAVE_INTERVAL) or _FIRST_SAVE_INTERVAL
        return time.monotonic() - self._saved_at >= interval

    def save(
        self, step: int, extra: Mapping[str, Any], metric: float | None, keep_steps: Collection[int] = ()
    ) -> Path | None:
        """Writes pending records, then a checkpoint.

        Returns:
            The checkpoint's path; None if writing failed and the run continues.
        """
        assert self.checkpoints is not None
        started, options = time.monotonic(), self._options
        path: Path | None = None

        def sync() -> None:
            self._write_records()
            self._run.sync()

        if self._attempt(sync, f"the records up to step {step}"):
            try:
                path = save_training(  # raises on all processes or on none
                    self._trainer, self.checkpoints, step=step, extra=extra, keep_last=options.keep_last,
                    metric=metric if options.keep_best else None, keep_steps=keep_steps,
                )  # fmt: skip
            except CheckpointError as error:
                if self._on_disk_error == "stop":
                    self.event(f"checkpoint of step {step} failed: {error}")
                    raise
                self.disk_errors += 1
                logger.warning("%s; will retry", error)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started
        if path is None:
            self.event(f"checkpoint of step {step} failed; will retry")
            return None
        self.last_step, self._last_path = step, path
        self.event(f"checkpoint of step {step} saved in {self._save_seconds:.2f} s")
        return path

    def insist(self, work: Callable[[], bool], waits: Sequence[float] = (0.1, 1.0)) -> None:
        """Runs work that the end of a run requires, retrying on disk errors; the last failure raises."""
        for wait in waits:
            if work():
                return
            time.sleep(wait)
        self._on_disk_error = "stop"
        work()

    def newest_and_best(self) -> tuple[Path | None, Path | None]:
        """Paths of the newest and the best checkpoint. Every process must call this."""
        if self.checkpoints is None:
            return None, None
        accelerator = self._trainer.accelerator
        best = share_json(accelerator, best_name(self.checkpoints) if accelerator.is_main_process else None)[0]
        return self._last_path, self.checkpoints / best if best else None

    # The end ---------------------------------------------------------------------------------------------------------

    def finish(self, summary: Mapping[str, Any], *, model: bool) -> None:
        """Writes the summary, including the run's last row, and with `model` also the model in transformers format."""

        def write() -> None:
            self._write_records()
            if model and isinstance(self._run, RunDirectory):
                self._write_model(self._run.path)
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

    def _write_model(self, folder: Path) -> None:
        """Saves the model to `folder/model`. An old one is moved aside first: folders cannot be replaced atomically."""
        from safetensors import SafetensorError

        staging, target = folder / f"{files.STAGING}final", folder / "model"
        if staging.exists():
            files.remove(staging)
        try:
            self._trainer.save_pretrained(staging / "model")
        except SafetensorError as error:  # safetensors' wrapper for disk errors
            files.remove(staging)
            raise OSError(f"the model could not be written to {folder}: {error}") from error
        except OSError:
            if staging.exists():
                files.remove(staging)
            raise
        for path in (staging / "model").iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            files.move(target, staging / "before")
        files.move(staging / "model", target)
        files.remove(staging)

    def dump(self, step: int, skipped: SkippedUpdate) -> None:
        """Dumps this process's minibatch of a skipped, non-finite update for inspection; never stops the run."""
        rank, number = self._trainer.accelerator.process_index, self._dump_count
        if self.path is None or number >= _MAX_DUMPS:
            return
        self._dump_count += 1
        name = f"step-{step:08d}-process-{rank}-{skipped.in_a_row}.safetensors"
        text = f"step {step}: optimizer step skipped ({skipped.in_a_row} in a row), gradient norm {skipped.grad_norm}"
        if skipped.experience is not None:
            try:
                files.make_folder(self.path / "dumps")
                pieces = safetensors_pieces(_tensors_of(skipped.experience))
                files.write_atomic(self.path / "dumps" / name, b"".join(bytes(piece) for piece in pieces))
                text += f"; minibatch written to dumps/{name}"
            except OSError as error:
                self.disk_errors += 1
                logger.warning("a skipped minibatch could not be written: %s", error)
        self.event(text)


def _tensors_of(experience: Experience) -> dict[str, Tensor]:
    """Tensors of an experience and its rollout by name, without the extra fields of `Rollout` subclasses."""
    pairs = [(experience.rollout, fields(Rollout)), (experience, fields(experience))]
    values = {field.name: getattr(owner, field.name) for owner, owner_fields in pairs for field in owner_fields}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
