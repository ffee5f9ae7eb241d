"""What a managed run is asked for, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trl.protocols import Callback, Tracker
from trl.runs.spikes import SpikeSettings

OnSpike = Literal["warn", "skip", "rollback"]
OnDiskError = Literal["stop", "go_on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a managed run came to."""

    steps: int
    """Steps done since the run began, over all resumptions."""
    episodes: int
    """Samples, over all processes."""
    reason: str
    """Why it ended: "steps", or "callback"."""
    last: Path | None
    """The newest checkpoint."""
    best: Path | None
    """The best of the checkpoints that were kept."""
    run_dir: Path | None
    """The folder of the run."""
    seconds: float
    """Since `train` was called."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The row of the last step; empty if this call made none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The arguments of `PPOTrainer.train`, which explains them, checked.

    Raises:
        ValueError: naming the argument, its value and what is expected.
    """

    prompts: Any
    reward: Any
    steps: int | None = None
    episodes: int | None = None
    run_dir: str | Path | None = None
    resume: bool | Literal["auto"] = False
    generation: Mapping[str, Any] | None = None
    length_sampler: Callable[[], int] | None = None
    eval_prompts: Any = None
    eval_every: int | None = None
    save_every: int | None = None
    keep_last: int = 2
    keep_best: bool = True
    on_spike: OnSpike | None = "warn"
    spike: SpikeSettings | None = None
    max_skipped_updates: int | None = 3
    on_disk_error: OnDiskError = "stop"
    callbacks: Sequence[Callback] = ()
    trackers: Sequence[Tracker] = ()
    progress: bool | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.episodes is None):
            raise ValueError(f"steps={self.steps!r} and episodes={self.episodes!r}: exactly one of them is expected")
        for name in ("steps", "episodes", "eval_every", "save_every", "keep_last", "max_skipped_updates"):
            value = getattr(self, name)
            wrong = not isinstance(value, int) or isinstance(value, bool) or value < 1
            if wrong and (value is not None or name == "keep_last"):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        choices = {"on_spike": (None, *get_args(OnSpike)), "on_disk_error": get_args(OnDiskError)}
        for name, allowed in (choices | {"resume": (False, True, "auto")}).items():
            value = getattr(self, name)
            # 0 equals False, and is none of them.
            if not any(value == one and type(value) is type(one) for one in allowed):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
        if self.resume is True and self.run_dir is None:
            raise ValueError("resume=True needs a run_dir, in which the run is")
        if self.eval_every is not None and self.eval_prompts is None:
            raise ValueError(f"eval_every={self.eval_every} needs eval_prompts")
        longest = (self.generation or {}).get("max_new_tokens", 1)
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            raise ValueError(f"generation: max_new_tokens={longest!r} must be a whole number of at least 1")
        if "return_prompt" in (self.generation or {}):
            raise ValueError("generation must not hold return_prompt: the loop needs responses alone")

    def target(self, batch_size: int) -> int:
        """Steps of the run, of `batch_size` samples over all processes."""
        return self.steps if self.steps is not None else math.ceil((self.episodes or 0) / batch_size)

    def evaluates_every(self, batch_size: int) -> int | None:
        """Steps from one evaluation to the next; None: never."""
        if self.eval_prompts is None:
            return None
        return self.eval_every or max(1, self.target(batch_size) // 20)

    def saves_every(self, batch_size: int) -> int | None:
        """Steps from one checkpoint to the next; None: by the clock, which no run that rolls back may depend on."""
        if self.save_every is None and self.on_spike == "rollback":
            return max(1, self.target(batch_size) // 20)
        return self.save_every

    def generation_for(self, temperature: float, stops: Sequence[int]) -> dict[str, Any]:
        """Keyword arguments of `PPOTrainer.generate`: by default, the distribution that the update scores."""
        settings: dict[str, Any] = {
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "temperature": temperature,
            "max_new_tokens": 64,
        }
        if stops:
            settings["eos_token_id"] = list(stops)
        return settings | {"batch_size": 16} | dict(self.generation or {})
