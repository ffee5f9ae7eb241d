"""The trackers that `PPOConfig.log_with` names: whether they are installed, and the settings that they are told."""

from __future__ import annotations

from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration

from trl.core import flatten_dict
from trl.trackers.plain import plain
from trl.trainer.ppo_config import PPOConfig


def check_trackers(config: PPOConfig) -> None:
    """Refuses a tracker that accelerate would leave out with a warning, before anything is started.

    Raises:
        ImportError: if the package of a tracker is not installed.
        ValueError: if accelerate knows no tracker of that name, or it needs a folder and has none.
    """
    given = config.log_with
    names = [str(getattr(t, "value", t)) for t in _as_list(given) if not isinstance(t, GeneralTracker)]
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name == "all":
            if not installed:
                raise ImportError("log_with='all', and no tracker is installed: pip install tensorboard, for example")
        elif name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"log_with={name!r} is none of {', '.join(LOGGER_TYPE_TO_CLASS)}, all")
        elif name in LoggerType.list() and name not in installed:
            package = name.replace("_", "-")
            raise ImportError(f"log_with={name!r} needs the package {package}: pip install {package}")
        elif (
            LOGGER_TYPE_TO_CLASS[name].requires_logging_directory
            and ProjectConfiguration(**config.project_kwargs).logging_dir is None
        ):
            raise ValueError(f"log_with={name!r} writes to a folder: set project_kwargs={{'logging_dir': ...}}")


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def settings_to_track(config: PPOConfig) -> dict[str, Any]:
    """The settings as trackers take them: numbers and texts by name, nested ones under `outer/inner`, without secrets."""
    settings = {**vars(config), "total_ppo_epochs": config.total_ppo_epochs}
    return {k: v for k, v in flatten_dict(plain(settings)).items() if isinstance(v, int | float | str)}
