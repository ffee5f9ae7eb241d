"""An offline stage in a run directory: the files, signals and resuming of PPO's runs, as a callback of transformers."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl.files import write_atomic
from trl.runs.progress import NoProgress, Progress, progress_for
from trl.runs.recorder import Recorder
from trl.runs.signals import SignalWatch, raise_for
from trl.training.peak import memory_statistics
from trl.training.processes import share_json

logger = logging.getLogger(__name__)

_STATE = "StageRun"  # where a checkpoint's trainer_state.json keeps what transformers does not
_TIMES = re.compile(r".*_(runtime|samples_per_second|steps_per_second|tokens_per_second|model_preparation_time)")


class RunningStage(Protocol):
    """What a run needs of its trainer; `StageTrainer` has it."""

    accelerator: Any
    args: Any
    callback_handler: Any
    model: Any
    state: Any
    train_dataset: Any

    def save_model(self, output_dir: str, _internal_call: bool) -> None:
        """Writes model and tokenizer."""
        ...

    def _trl_log_sums(self) -> dict[str, Any]: ...

    def _trl_restore_log_sums(self, sums: Mapping[str, Any]) -> None: ...


class NoRun:
    """A training without a run directory."""

    checkpoints: Path | None = None

    def before_save(self) -> None:
        """Does nothing."""


class RunIsDone(Exception):
    """Raised before the first step if a resumed run is already over: transformers would take one more step."""


class StageRun(TrainerCallback):
    """Records a training of an offline stage: a context manager around `transformers.Trainer.train`.

    A row of `metrics.jsonl` has everything that is logged at a step, of training and of evaluations, and reaches the
    disk before the checkpoint of its step. A checkpoint is written after the evaluation of its step, at the last step,
    and after a signal, with the sums of the rows that it interrupts, so that a resumed run writes the rows of an
    uninterrupted one.

    Args:
        trainer: the stage.
        run_dir: run folder; checkpoints go into its `checkpoints/`.
        resume: None or False: a new run; True: there must be a run; "auto": either.
        launch: how the run was started, kept in the settings.
        progress: show progress; None: unless `args.disable_tqdm`.

    Raises:
        ValueError: if the folder does or does not hold a run, against `resume`, or checkpoints could not be resumed
            from.
        RunLocked: if another process is writing the run.
    """

    def __init__(
        self,
        trainer: RunningStage,
        run_dir: str | Path,
        *,
        resume: str | bool | None,
        launch: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> None:
        if resume not in (None, False, True, "auto"):
            raise ValueError(
                f"resume_from_checkpoint={resume!r} with run_dir={str(run_dir)!r}: a run goes on from a checkpoint of "
                "its own; "
                'pass True or "auto"'
            )
        if trainer.args.save_only_model:
            raise ValueError("save_only_model=True leaves nothing to resume a run from: leave it out")
        kind = trainer.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"run_dir={str(run_dir)!r} with {kind.value}: a run's model is written by one process; leave it out"
            )
        self._trainer, self._launch = trainer, launch
        self._show = not trainer.args.disable_tqdm if progress is None else progress
        self._progress: Progress = NoProgress()
        self._stack = ExitStack()
        self._signals = SignalWatch(announce=self._show)
        self._interrupted = 0  # the signal that ends the run
        self._save_due = False  # the checkpoint of this step waits for the evaluation at the epoch's end
        self._row: dict[str, Any] = {}
        self._last_row: dict[str, Any] = {}
        self._started = self._save_began = time.monotonic()
        self._first, self._recorded = 0, -1  # steps: the first of this call, and that of the last row
        self._row_began = (self._started, 0, 0)  # time, step and tokens at the end of the row before
        self.recorder = Recorder(
            trainer.accelerator, run_dir, resume=resume or False, argument="resume_from_checkpoint"
        )
        checkpoints = self.recorder.checkpoints
        assert checkpoints is not None
        self.checkpoints: Path = checkpoints
        found = last_whole_checkpoint(str(checkpoints)) if resume else None
        self.checkpoint: Path | None = None if found is None else Path(found)
        """The checkpoint to resume from."""

    def __enter__(self) -> StageRun:
        handler = self._trainer.callback_handler
        shown = [callback for callback in handler.callbacks if isinstance(callback, ProgressCallback | PrinterCallback)]
        handler.callbacks = [*(callback for callback in handler.callbacks if callback not in shown), self]
        self._stack.callback(self.recorder.close)
        self._stack.callback(lambda: self._progress.close())
        self._stack.callback(lambda: handler.callbacks.extend(shown))
        self._stack.callback(handler.callbacks.remove, self)
        self._stack.enter_context(self._signals)
        self._stack.push(self._record_failure)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # Callbacks of transformers ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins or resumes the records, once the checkpoint is loaded."""
        stored = state.stateful_callbacks.pop(_STATE, None) if self.checkpoint is not None else None
        if stored is not None:
            self._check_plan(stored["plan"])
            self._trainer._trl_restore_log_sums(stored["sums"])
        step = state.global_step
        config = {
            "algorithm": {"name": stage_name(args), "offline": True},
            stage_name(args): args,
            "train": {"steps": state.max_steps},
            "model": {"name": getattr(getattr(self._trainer.model, "config", None), "_name_or_path", None)},
        }
        if self._launch is not None:
            config["launch"] = self._launch
        self.recorder.begin(step, self.checkpoint, config, last_row=0 if stored is None else stored["row"])
        source = "" if self.checkpoint is None else f", from {self.checkpoint.name}"
        self.recorder.event(f"from step {step} to {state.max_steps}{source}")
        last = max((row["step"] for row in self.recorder.rows()), default=-1)  # on the main process
        self._recorded = max(share_json(self._trainer.accelerator, last))
        if self._trainer.accelerator.is_main_process:
            self._progress = progress_for(self._show, done=step, target=state.max_steps)
        self._first = step
        self._row_began = (time.monotonic(), step, int(state.num_input_tokens_seen))
        if self.checkpoint is not None and step >= state.max_steps:
            raise RunIsDone

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the row of the step before, which no evaluation can add to any more."""
        if state.global_step == self._first and self.checkpoint is not None:
            self._row = {}  # an evaluation before the first step: an uninterrupted run has none here
        self._flush()
        if state.global_step > self._first:
            self._progress.update(state.global_step, self._last_row)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops after a signal; puts the checkpoint of an epoch's last step off until its evaluation is done."""
        if not self._interrupted:
            self._interrupted = max(share_json(self._trainer.accelerator, self._signals.received or 0))
        if self._interrupted:
            control.should_training_stop = True
        if control.should_save and (control.should_training_stop or _ends_epoch(state)):
            control.should_save, self._save_due = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Saves what was put off, and the last step."""
        if self._interrupted and not _ends_epoch(state) and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = False  # an uninterrupted run would not do so here
        at_the_end = control.should_training_stop and args.save_strategy != "no"
        if (self._save_due or self._interrupted or at_the_end) and self.recorder.last_step != state.global_step:
            control.should_save = True
        self._save_due = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds to the row of this step."""
        if "train_loss" not in logs:  # transformers' summary of this call of `train`
            self._row |= {f"time/{key}" if _TIMES.fullmatch(key) else key: value for key, value in logs.items()}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes a checkpoint that is complete."""
        name = f"checkpoint-{state.global_step}"
        if self._trainer.accelerator.is_main_process:
            # The arguments as a pickle, which nobody reads and which may hold a token.
            (self.checkpoints / name / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            pointer = {"checkpoint": name, "step": state.global_step}
            write_atomic(self.checkpoints / "latest.json", json.dumps(pointer).encode())
        self.recorder.saved(state.global_step, time.monotonic() - self._save_began)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the last row."""
        self._flush()
        self._progress.update(state.global_step, self._last_row)

    # Saves and the end -----------------------------------------------------------------------------------------------

    def before_save(self) -> None:
        """Writes the rows that a checkpoint relies on, and gives it what transformers does not keep."""
        self._save_began = time.monotonic()
        self._flush()
        state = self._trainer.state
        self.recorder.sync(state.global_step)
        sums = self._trainer._trl_log_sums()
        state.stateful_callbacks[_STATE] = {"plan": self._plan(), "sums": sums, "row": self._recorded}

    def end(self) -> None:
        """Writes the model and the summary.

        Raises:
            KeyboardInterrupt: if SIGINT ended the run, once it is saved.
            SystemExit: if SIGTERM did.
        """
        state = self._trainer.state
        name = {2: "SIGINT", 15: "SIGTERM"}.get(self._interrupted)
        reason = name or ("steps" if state.global_step >= state.max_steps else "callback")
        summary = {
            "reason": reason,
            "steps": state.global_step,
            "target": state.max_steps,
            "time/seconds": time.monotonic() - self._started,
        }
        self.recorder.finish(summary, save_model=None if self._interrupted else self._save_model)
        how = f"stopped by {name}" if name else "ended"
        self.recorder.insist_on_event(
            f"{how} after step {state.global_step} of {state.max_steps}" + ("" if name else f": {reason}")
        )
        if self._interrupted:
            raise_for(self._interrupted)

    def _save_model(self, folder: Path) -> None:
        self._trainer.save_model(str(folder), _internal_call=True)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _record_failure(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Logs the exception that ended the run to the events."""
        if isinstance(error, Exception):
            state = self._trainer.state
            self.recorder.failed(state.global_step + 1, error, target=state.max_steps or state.global_step + 1)
        return False

    # Rows ------------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Writes the row of this step, if anything was logged."""
        if not self._row:
            return
        step, tokens = self._trainer.state.global_step, int(self._trainer.state.num_input_tokens_seen)
        row, self._row = self._row, {}
        if step <= self._recorded:
            self.recorder.event(f"logged after the row of step {step} was written, and left out: {', '.join(row)}")
            return
        now = time.monotonic()
        began, first, tokens_before = self._row_began
        if step > first:
            row["time/step"] = (now - began) / (step - first)
            if tokens > tokens_before:
                row["time/train_tokens_per_second"] = (tokens - tokens_before) / (now - began)
        row |= memory_statistics(self._trainer.args.device)
        self._row_began, self._recorded, self._last_row = (now, step, tokens), step, row
        self.recorder.record(step, row)

    # Resuming --------------------------------------------------------------------------------------------------------

    def _plan(self) -> dict[str, Any]:
        """What the order of the data follows from."""
        args, rows = self._trainer.args, self._trainer.train_dataset
        return {
            "rows": len(rows) if hasattr(rows, "__len__") else None,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def _check_plan(self, before: Mapping[str, Any]) -> None:
        """Refuses to go on in the order of other data.

        Raises:
            ValueError: naming each difference.
        """
        now = self._plan()
        names = {"rows": "rows of the training data", "batch": "rows of an optimizer step", "seed": "seed"}
        differing = [
            f"{names[key]}: {before.get(key)} then, {now[key]} now" for key in now if before.get(key) != now[key]
        ]
        if differing:
            raise ValueError(
                f"{self.checkpoint} is of a run with other settings ({'; '.join(differing)}): use those, or another "
                "run folder"
            )


def stage_name(args: Any) -> str:
    """The name of a stage, from its settings: "sft", "reward", "dpo", "kto"."""
    return type(args).__name__.removesuffix("Config").lower()


def _ends_epoch(state: Any) -> bool:
    return state.epoch is not None and float(state.epoch).is_integer()


def last_whole_checkpoint(folder: str) -> str | None:
    """Returns the latest checkpoint in `folder` that was saved to its end; None if there is no such checkpoint."""
    steps = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name[11:].isdigit()
    }
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # transformers writes it last
        except (OSError, ValueError):
            logger.warning("%s was not saved to its end: going on from the checkpoint before it", path)
            continue
        return str(path)
    return None
