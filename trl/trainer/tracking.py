"""The trackers named in `PPOConfig.log_with`: checks them, and runs each behind a `SafeTracker`."""

from __future__ import annotations

import atexit
import difflib
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from trl.core import flatten_dict
from trl.trackers import SafeTracker, run_folder
from trl.trackers.clients import ADAPTERS, AccelerateTracker, Late, TrackedRun, TrackerIds
from trl.trackers.plain import plain
from trl.trainer.ppo_config import PPOConfig

if TYPE_CHECKING:
    from trl.protocols import Tracker

_CLOSE_SECONDS = 15.0  # for the rows left at the end of a run, and for a client's last upload
_START_SECONDS = 30.0  # for a client that a script asks for
_RUNS = Path("runs")  # where trackers of a script's own loop write unless told otherwise
_PACKAGES = {"comet_ml": "comet-ml"}
_OFFLINE = ("offline", "disabled", "dryrun")


def tracker_names(log_with: Any) -> list[Any]:
    """The trackers of `log_with`, each once: names, and objects of accelerate's `GeneralTracker`.

    Raises:
        ImportError: for "all" if no tracker is installed.
    """
    given = list(log_with) if isinstance(log_with, list | tuple) else [] if log_with is None else [log_with]
    names: list[Any] = []
    for tracker in given:
        name = tracker if isinstance(tracker, GeneralTracker) else str(getattr(tracker, "value", tracker))
        every = [str(installed) for installed in get_available_trackers()] if name == "all" else [name]
        if not every:
            raise ImportError("log_with='all' needs at least one installed tracker: pip install tensorboard")
        names += [one for one in every if one not in names]
    return names


def check_trackers(config: PPOConfig) -> None:
    """Rejects a tracker that does not exist, is not installed or has no login, before anything is started.

    Raises:
        ImportError: if a tracker's package is not installed.
        ValueError: if there is no such tracker, wandb has no API key, or the project's name is no name for a folder.
    """
    for name in tracker_names(config.log_with):
        if isinstance(name, GeneralTracker):
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            raise ValueError(
                f"log_with={name!r} is not a tracker"
                + (f"; did you mean {near[0]!r}? All: " if near else "; expected one of ")
                + f"{', '.join(LOGGER_TYPE_TO_CLASS)}, all"
            )
        if name in LoggerType.list() and not _is_installed(name):
            raise ImportError(
                f"log_with={name!r} needs the package {(package := _PACKAGES.get(name, name))}: pip install {package}"
            )
        if name == "tensorboard":
            run_folder(config.tracker_project_name, _RUNS)
        if name == "wandb":
            _check_wandb_login(config.tracker_kwargs.get("wandb", {}))


def _is_installed(name: str) -> bool:
    return name in [str(tracker) for tracker in get_available_trackers()]


def _check_wandb_login(options: Mapping[str, Any]) -> None:
    """Logs in to wandb on the calling thread, where it may prompt for a key. Sends no request."""
    mode = options.get("mode") or os.environ.get("WANDB_MODE", "online")
    if mode in _OFFLINE:
        return
    import wandb

    if wandb.run is not None:  # the script has started a run
        return
    try:
        wandb.login(verify=False)
    except wandb.errors.Error as error:
        raise ValueError(
            f"log_with='wandb' has no API key: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline ({error})"
        ) from error


class NamedTracker(GeneralTracker):
    """One tracker of `log_with`, as accelerate's list of trackers holds it: `accelerator.log` reaches it.

    It starts with its first row, on a thread of its own, and writes to the folder of a managed run between `begin_run`
    and `finish`; outside, to `logging_dir` of `PPOConfig.project_kwargs`, or a new folder `runs/PROJECT/TIME`.

    Args:
        tracker: its name, or an object of accelerate's.
        config: the trainer's settings.
    """

    requires_logging_directory = False
    name = ""

    def __init__(self, tracker: str | GeneralTracker, config: PPOConfig) -> None:
        super().__init__()
        self.name = tracker if isinstance(tracker, str) else tracker.name
        self._tracker, self._config = tracker, config
        self._late: Late | None = None
        self._safe: SafeTracker | None = None
        self._last_step = 0

    def begin_run(self, folder: Path | None, step: int, settings: Mapping[str, Any]) -> SafeTracker:
        """Starts the tracker for a managed run.

        Args:
            folder: run folder; None if the run has none.
            step: step from which the run starts or resumes.
            settings: settings of the run, for the tracker besides the trainer's.

        Returns:
            The tracker; closing it ends the run's part.
        """
        self.finish()
        return self._open(folder, step, settings)

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Queues values; those without a step belong to the last one."""
        self._last_step = self._last_step if step is None else step
        safe = self._safe if self._safe is not None and not self._safe.closed else self._open(None, 0, {})
        safe.log(values, self._last_step)

    @property
    def tracker(self) -> Any:
        """The client's object, such as wandb's run, once it has started; None if it fails or takes over 30 seconds."""
        if self._safe is None or self._safe.closed or self._late is None:
            self._open(None, 0, {})
        assert self._late is not None
        self._late.ready.wait(_START_SECONDS)
        return self._late.client

    def finish(self) -> None:
        """Delivers the rows so far and closes the tracker; the next row starts it again."""
        if self._safe is not None:
            self._safe.close()
            atexit.unregister(self._safe.close)
        self._safe = self._late = None

    def _open(self, folder: Path | None, step: int, run_settings: Mapping[str, Any]) -> SafeTracker:
        settings = settings_to_track(self._config) | _flat(run_settings)
        late = Late(partial(self._start, folder, step, settings), self._close_at_exit)
        self._late, self._safe = late, SafeTracker(late, name=self.name, close_timeout=_CLOSE_SECONDS)
        atexit.register(self._safe.close)
        self._safe.log({}, step)
        return self._safe

    def _close_at_exit(self) -> None:
        """Moves our exit handler before the client's own, which would close it with rows still queued."""
        if (safe := self._safe) is not None:
            atexit.unregister(safe.close)
            with suppress(RuntimeError):  # the interpreter is exiting already
                atexit.register(safe.close)

    def _start(self, folder: Path | None, step: int, settings: Mapping[str, int | float | str]) -> Tracker:
        """Starts the tracker; called on its thread."""
        config = self._config
        project, options = config.tracker_project_name, dict(config.tracker_kwargs.get(self.name, {}))
        if not isinstance(self._tracker, str):
            return AccelerateTracker(self._tracker, settings)
        given = ProjectConfiguration(**config.project_kwargs).logging_dir
        if given is not None:
            files = Path(given) / project if self.name == "tensorboard" else Path(given)
        elif folder is not None:
            files = folder / self.name if self.name == "tensorboard" else folder
        else:
            files = _new_folder(project) if self.name == "tensorboard" else _RUNS / project
        if self.name in ADAPTERS:
            return ADAPTERS[self.name](
                TrackedRun(
                    project=project,
                    name=config.exp_name or (None if folder is None else folder.name),
                    folder=files,
                    settings=settings,
                    options=options,
                    step=step,
                    ids=TrackerIds(folder),
                )
            )
        made = LOGGER_TYPE_TO_CLASS[self.name]
        needs_folder = (files,) if made.requires_logging_directory else ()
        return AccelerateTracker(made(project, *needs_folder, **options), settings)


def _new_folder(project: str) -> Path:
    """A new folder `runs/PROJECT/TIME`, so that the curves of two runs do not mix."""
    parent = run_folder(project, _RUNS)
    parent.mkdir(parents=True, exist_ok=True)
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    for name in (time, *(f"{time}-{number}" for number in range(2, 1000))):
        with suppress(FileExistsError):
            (parent / name).mkdir()
            return parent / name
    raise FileExistsError(f"{parent} has 999 folders named {time}")


def settings_to_track(config: PPOConfig) -> dict[str, Any]:
    """Settings for trackers: numbers and strings by name, flattened as `outer/inner`, with secrets redacted."""
    settings = {**vars(config), "total_ppo_epochs": config.total_ppo_epochs}
    return _flat(settings)


def _flat(settings: Mapping[str, Any]) -> dict[str, int | float | str]:
    return {k: v for k, v in flatten_dict(plain(settings)).items() if isinstance(v, int | float | str)}
