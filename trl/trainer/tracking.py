"""Checks the trackers named in `PPOConfig.log_with` and prepares the settings they record."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from trl.core import flatten_dict
from trl.trackers.plain import plain
from trl.trainer.ppo_config import PPOConfig


def check_trackers(config: PPOConfig) -> None:
    """Rejects up front a tracker that accelerate would merely skip with a warning.

    Raises:
        ImportError: if a tracker's package is not installed.
        ValueError: if accelerate does not support the tracker, or it needs a logging folder and none is set.
    """
    log_with = config.log_with
    names = [str(getattr(t, "value", t)) for t in _as_list(log_with) if not isinstance(t, GeneralTracker)]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name == "all":
            if not installed:
                raise ImportError(
                    "log_with='all' needs at least one installed tracker, for example: pip install tensorboard"
                )
        elif name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"log_with={name!r} is not supported; expected one of {', '.join(LOGGER_TYPE_TO_CLASS)}, all"
            )
        elif name in LoggerType.list() and name not in installed:
            package = name.replace("_", "-")
            raise ImportError(f"log_with={name!r} needs the package {package}: pip install {package}")
        elif (
            LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
            and ProjectConfiguration(**config.project_kwargs).logging_dir is None
        ):
            raise ValueError(f"log_with={name!r} needs a folder to write to: set project_kwargs={{'logging_dir': ...}}")


def _as_list(log_with: Any) -> list[Any]:
    return list(log_with) if isinstance(log_with, list | tuple) else [] if log_with is None else [log_with]


def settings_to_track(config: PPOConfig) -> dict[str, Any]:
    """Settings for trackers: numbers and strings by name, flattened as `outer/inner`, with secrets redacted."""
    settings = {**vars(config), "total_ppo_epochs": config.total_ppo_epochs}
    return {k: v for k, v in flatten_dict(plain(settings)).items() if isinstance(v, int | float | str)}
