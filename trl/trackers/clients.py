"""Adapters from `Tracker` to TensorBoard, Weights & Biases, trackio, MLflow and accelerate's other trackers.

Each starts in its constructor, so construct it on the thread of a `SafeTracker` (see `Late`): clients ask servers, wait
and fail.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trl.files import write_atomic
from trl.trackers.completions import Table
from trl.trackers.plain import as_number

if TYPE_CHECKING:
    from trl.protocols import Tracker

IDS_FILE = "trackers.json"
_MLFLOW_BATCH = 100  # maximum number of parameters per request to an MLflow server


class TrackerIds:
    """Trackers' ids of a run, kept in `trackers.json` of its folder, so that a resumed run continues there.

    Args:
        folder: run folder; None forgets the ids at the end of the process.
    """

    _lock = threading.Lock()  # several trackers of a run start at once, each on its thread

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / IDS_FILE

    def get(self, tracker: str) -> str | None:
        """The run's id in a tracker; None if it has none yet.

        Raises:
            ValueError: if the file is damaged.
        """
        return self._read().get(tracker)

    def set(self, tracker: str, run_id: str) -> None:
        """Records the run's id in a tracker."""
        if self._path is not None:
            with self._lock:
                ids = self._read() | {tracker: run_id}
                write_atomic(self._path, (json.dumps(ids, indent=2) + "\n").encode())

    def _read(self) -> dict[str, str]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            ids = json.loads(self._path.read_bytes())
        except ValueError:
            ids = None
        if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
            raise ValueError(
                f"{self._path} is not a mapping of trackers to ids: delete it to start new runs in trackers"
            )
        return ids


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run as its trackers are told of it."""

    project: str
    name: str | None = None
    """Name of the run; None lets the tracker choose one."""
    folder: Path
    """Folder for the tracker's own files."""
    settings: Mapping[str, int | float | str] = field(default_factory=dict)
    """Hyperparameters, flattened and without secrets."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The caller's arguments for the tracker's client."""
    step: int = 0
    """Step from which the run starts: 0, or that of the checkpoint from which it resumes."""
    ids: TrackerIds = field(default_factory=lambda: TrackerIds(None))


class Late:
    """Starts a tracker at the first row, on the thread that logs it; an empty row only starts it.

    Args:
        start: makes the tracker.
        started: called once it is made.
    """

    def __init__(self, start: Callable[[], Tracker], started: Callable[[], None] = lambda: None) -> None:
        self._start, self._started = start, started
        self._tracker: Tracker | None = None
        self._error: BaseException | None = None
        self.ready = threading.Event()
        """Set once the start has succeeded or failed."""

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Forwards a row. Raises the error of a failed start at every row."""
        if not self.ready.is_set():
            try:
                self._tracker = self._start()
                self._started()
            except BaseException as error:
                self._error = error
                raise
            finally:
                self.ready.set()
        if self._error is not None:
            raise self._error
        if row and self._tracker is not None:
            self._tracker.log(row, step)

    def close(self) -> None:
        """Closes the tracker if it was started."""
        if self._tracker is not None:
            self._tracker.close()

    @property
    def client(self) -> Any:
        """The tracker's own object, such as wandb's run; None if the start has failed or is not over."""
        return None if self._tracker is None else getattr(self._tracker, "client", self._tracker)


class TensorBoardTracker:
    """Writes event files: scalars, histograms of arrays, tables as text, hyperparameters."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # purge_step: TensorBoard hides what an earlier process wrote after the checkpoint.
        self.client = SummaryWriter(str(run.folder), **{"purge_step": run.step + 1, **run.options})
        writer = self.client._get_file_writer()
        for summary in hparams(dict(run.settings), {}):  # in the same file: add_hparams would make a second run of it
            writer.add_summary(summary)
        self.client.flush()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs a row."""
        for name, value in row.items():
            if (number := as_number(value)) is not None:
                self.client.add_scalar(name, number, step)
            elif isinstance(value, Table):
                self.client.add_text(name, value.markdown(), step)
            elif isinstance(value, str):
                self.client.add_text(name, value, step)
            elif isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.number):
                finite = value[np.isfinite(value)]
                if finite.size:
                    self.client.add_histogram(name, finite, step)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.client.close()


class WandbTracker:
    """Logs to Weights & Biases. A run that the script has started itself is used, and left open."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no telemetry
        import wandb

        self._wandb = wandb
        self._is_mine = wandb.run is None
        self._first_step = 0
        if self._is_mine:
            known = run.ids.get("wandb")
            run_id = known or secrets.token_hex(4)
            options = {
                "project": run.project,
                "name": run.name,
                "dir": str(run.folder),
                "id": run_id,
                "resume": "allow",
            }
            run.folder.mkdir(parents=True, exist_ok=True)
            self.client = wandb.init(**{**options, **run.options})
            run.ids.set("wandb", str(self.client.id))
            if known is not None:
                self._first_step = self.client.step
        else:
            self.client = wandb.run
        self.client.config.update(dict(run.settings), allow_val_change=True)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs a row. Steps that the resumed run has already are left out: they are the same to the bit."""
        if step >= self._first_step:
            self.client.log({name: self._shown(value) for name, value in row.items()}, step=step)

    def _shown(self, value: Any) -> Any:
        return self._wandb.Table(columns=value.columns, data=value.rows) if isinstance(value, Table) else value

    def close(self) -> None:
        """Finishes the run, unless the script started it."""
        if self._is_mine:
            self.client.finish()


class TrackioTracker:
    """Logs to trackio, whose database is outside the run folder, so that one dashboard shows all runs."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self._trackio = trackio
        known = run.ids.get("trackio")
        name = known or f"{run.name or run.project}-{secrets.token_hex(4)}"
        options = {"project": run.project, "name": name, "resume": "allow", "config": dict(run.settings)}
        self.client = trackio.init(**{**options, **run.options})
        run.ids.set("trackio", str(self.client.name))
        self._first_step = 0 if known is None else int(self.client._next_step)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs a row. Steps that the resumed run has already are left out: they are the same to the bit."""
        if step >= self._first_step:
            shown = {name: self._shown(value) for name, value in row.items()}
            self.client.log({name: value for name, value in shown.items() if value is not None}, step=step)

    def _shown(self, value: Any) -> Any:
        if isinstance(value, Table):
            return self._trackio.Table(columns=value.columns, data=value.rows)
        return value if isinstance(value, str) else as_number(value)

    def close(self) -> None:
        """Finishes the run."""
        self.client.finish()


class MlflowTracker:
    """Logs to an MLflow server or its local store, as one run of the experiment named after the project."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._entities = mlflow.entities
        options = dict(run.options)
        self.client = mlflow.MlflowClient(tracking_uri=options.pop("tracking_uri", None))
        run_id = options.pop("run_id", None) or os.environ.get("MLFLOW_RUN_ID") or run.ids.get("mlflow")
        self._first_step = 0
        known: Mapping[str, str] = {}
        if run_id is None:
            run_id = self._create(run, options)
        else:
            record = self.client.get_run(run_id)
            known = record.data.params
            self.client.update_run(run_id, status="RUNNING")
            self._first_step = self._next_step(run_id, list(record.data.metrics))
        self._run_id = str(run_id)
        run.ids.set("mlflow", self._run_id)
        # Parameters cannot be changed, so a resumed run keeps the first value of each.
        params = [self._entities.Param(k, str(v)) for k, v in run.settings.items() if k not in known]
        for start in range(0, len(params), _MLFLOW_BATCH):
            self.client.log_batch(self._run_id, params=params[start : start + _MLFLOW_BATCH])

    def _create(self, run: TrackedRun, options: dict[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        return str(self.client.create_run(experiment_id, **{"run_name": run.name, **options}).info.run_id)

    def _next_step(self, run_id: str, names: list[str]) -> int:
        """Step after the last one that has a metric, by one that every row has."""
        name = next((name for name in names if not name.startswith("eval/")), None)
        history = [] if name is None else self.client.get_metric_history(run_id, name)
        return 1 + max((metric.step for metric in history), default=-1)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs a row: numbers as metrics, tables as JSON artifacts. Skips steps that the resumed run already has."""
        if step < self._first_step:
            return
        now = int(time.time() * 1000)
        numbers = {name: number for name, value in row.items() if (number := as_number(value)) is not None}
        self.client.log_batch(
            self._run_id, metrics=[self._entities.Metric(name, value, now, step) for name, value in numbers.items()]
        )
        for name, value in row.items():
            if isinstance(value, Table):
                columns = {column: [r[i] for r in value.rows] for i, column in enumerate(value.columns)}
                self.client.log_table(self._run_id, columns, artifact_file=f"{name}/step-{step:08d}.json")

    def close(self) -> None:
        """Ends the run."""
        self.client.set_terminated(self._run_id)


class AccelerateTracker:
    """Adapts a tracker of accelerate's, such as comet_ml, or of the user's own: numbers, texts and arrays.

    Args:
        tracker: the tracker, not started.
        settings: hyperparameters.
    """

    def __init__(self, tracker: Any, settings: Mapping[str, int | float | str]) -> None:
        self._tracker = tracker
        tracker.start()
        tracker.store_init_configuration(dict(settings))

    @property
    def client(self) -> Any:
        """The tracker's own object."""
        return self._tracker.tracker

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Logs a row without its tables."""
        self._tracker.log({name: value for name, value in row.items() if not isinstance(value, Table)}, step=step)

    def close(self) -> None:
        """Finishes the tracker."""
        self._tracker.finish()


ADAPTERS: Mapping[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}
"""Trackers with an adapter here, by their name in `log_with`; others go through accelerate's."""
