"""Names and defaults of settings in other releases of TRL, and what to say of a name that is no setting."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

# Defaults of PPOConfig that TRL 0.7 to 0.11 changed against 0.4.6, and those of the settings that they added.
_OF_0_7 = {
    "model_name": "gpt2",
    "query_dataset": "imdb",
    "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
    "learning_rate": 1.41e-5,
    "batch_size": 128,
    "mini_batch_size": 128,
    "target_kl": 1.0,
    "ratio_threshold": 10.0,
}
DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "0.4": {},
    "0.5": {"ratio_threshold": 10.0},
    "0.6": {"ratio_threshold": 10.0},
    **dict.fromkeys(("0.7", "0.8", "0.9", "0.10"), _OF_0_7),
    "0.11": _OF_0_7 | {"query_dataset": "stanfordnlp/imdb"},
}
# Settings that came with 0.7: a script that gives one of them was written for the defaults above.
SINCE_0_7 = ("exp_name", "query_dataset", "reward_model", "optimize_device_cache", "dataset_num_proc")

# Settings of TRL 1's configurations, and settings that this library had: what takes their place.
_ELSEWHERE = {
    "beta": "init_kl_coef, the weight of the KL",
    "bf16": "dtype='bfloat16'",
    "compile": "nothing: compiled layers made updates no faster, so the setting was removed",
    "epsilon": "cliprange",
    "kl_coef": "init_kl_coef, with adap_kl_ctrl=False to keep it fixed",
    "max_completion_length": "train(generation={'max_new_tokens': ...})",
    "max_new_tokens": "train(generation={'max_new_tokens': ...}), or an argument of generate",
    "max_steps": "train(steps=...)",
    "num_generations": "group_size",
    "num_ppo_epochs": "ppo_epochs",
    "output_dir": "train(run_dir=...)",
    "per_device_train_batch_size": "mini_batch_size, per forward and backward pass, and batch_size, per call to step",
    "report_to": "log_with",
    "reward_weights": "train(reward={name: function}) and trl.rewards.weighted",
    "save_steps": "train(save_every=...)",
    "total_ppo_epochs": "nothing: it follows from steps and batch_size",
    "total_episodes": "train(episodes=...)",
}


def names_unknown_settings(cls: type[T]) -> type[T]:
    """Makes a dataclass answer an unknown keyword with the name that was probably meant.

    Raises (in the constructor):
        TypeError: for a keyword that is no field; the message says what takes its place, or which field is nearest.
    """
    create: Callable[..., None] = cls.__init__

    @wraps(create)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
        if unknown := [name for name in kwargs if name not in known]:
            raise TypeError("; ".join(_explain(cls.__name__, name, known) for name in unknown))
        create(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _explain(config: str, name: str, known: Sequence[str]) -> str:
    if name in _ELSEWHERE:
        return f"{config} has no setting {name}: use {_ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{config} has no setting {name}" + (f": did you mean {close[0]}?" if close else "")
