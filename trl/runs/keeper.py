"""Writes a managed run's checkpoints beside its records."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from trl import files
from trl.runs.options import TrainOptions
from trl.runs.recorder import Recorder
from trl.state.checkpoints import CheckpointError, best_name
from trl.state.tensorfile import safetensors_pieces
from trl.training.guards import SkippedUpdate
from trl.training.processes import share_json
from trl.training.resume import check_can_be_saved, save_training
from trl.training.run_state import Learner
from trl.types import Experience, Rollout

logger = logging.getLogger(__name__)

_MAX_DUMPS = 20  # skipped minibatches dumped per call to `train`
_SAVE_INTERVAL_FACTOR = 125  # save interval in save durations; with the early first save, still under 1% of an hour
_MAX_SAVE_INTERVAL = 1800.0  # maximum seconds between checkpoints
_FIRST_SAVE_INTERVAL = 60.0  # seconds to the first checkpoint, while the duration of a save is still unknown


class Keeper(Recorder):
    """A `Recorder` that also writes checkpoints: when they are due, which are kept, and what a failure means.

    Every process must call the same methods in the same order, except for `event` and `dump`.
    """

    def __init__(self, trainer: Learner, options: TrainOptions, save_every: int | None) -> None:
        if options.run_dir is not None:
            check_can_be_saved(trainer)
        self._trainer = trainer
        self._options = options
        self._save_every = save_every
        self._last_path: Path | None = None
        self._dump_count = 0
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        super().__init__(
            trainer.accelerator, options.run_dir, resume=options.resume, on_disk_error=options.on_disk_error
        )

    def begin(self, step: int, checkpoint: Path | None, config: Mapping[str, Any], last_row: int | None = None) -> None:
        """As `Recorder.begin`."""
        self._last_path = checkpoint
        super().begin(step, checkpoint, config, last_row)

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
        if self.sync(step):
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
        self._last_path = path
        self.saved(step, self._save_seconds)
        return path

    def newest_and_best(self) -> tuple[Path | None, Path | None]:
        """Paths of the newest and the best checkpoint. Every process must call this."""
        if self.checkpoints is None:
            return None, None
        accelerator = self._trainer.accelerator
        best = share_json(accelerator, best_name(self.checkpoints) if accelerator.is_main_process else None)[0]
        return self._last_path, self.checkpoints / best if best else None

    def dump(self, step: int, skipped: SkippedUpdate) -> None:
        """Dumps this process's minibatch of a skipped, non-finite update for inspection; never stops the run."""
        rank, number = self._trainer.accelerator.process_index, self._dump_count
        if self.path is None or number >= _MAX_DUMPS:
            return
        self._dump_count += 1
        name = f"step-{step:08d}-process-{rank}-{number + 1}.safetensors"
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
