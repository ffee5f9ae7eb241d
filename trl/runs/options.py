"""Options and result of a managed run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trl.protocols import Callback, Tracker
from trl.runs.spikes import SpikeSettings
from trl.runs.watching import NoWatch, Watch
from trl.trackers import Finding

OnSpike = Literal["warn", "skip", "rollback"]
OnDiskError = Literal["stop", "go_on"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Result of a trainer's `train`."""

    steps: int
    """Total steps of the run, including those from before it was resumed."""
    episodes: int
    """Total samples, over all processes."""
    reason: str
    """Why the run ended: "steps" or "callback"."""
    last: Path | None
    """Newest checkpoint."""
    best: Path | None
    """Best checkpoint among those kept."""
    run_dir: Path | None
    """Run folder."""
    seconds: float
    """Wall-clock seconds of this `train` call."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics row of the last step; empty if this call took no step."""
    findings: tuple[Finding, ...] = ()
    """The doctor's findings in the whole run, on the main process."""

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the report on this run, one HTML file, and returns its path; see `trl.report.write_report`.

        Args:
            out: file to write; by default report.html in the run folder.

        Raises:
            ValueError: if the run has no folder.
        """
        if self.run_dir is None:
            raise ValueError("the run has no records to report on: pass run_dir to train")
        from trl.report import write_report

        return write_report(self.run_dir, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Validated arguments of `train`, which explains them.

    Raises:
        ValueError: if an argument is invalid; the message names it, its value and what is expected.
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
    launch: Mapping[str, Any] | None = None
    watch: Watch = field(default_factory=NoWatch)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.episodes is None):
            raise ValueError(f"steps={self.steps!r} and episodes={self.episodes!r}: set exactly one of them")
        for name in ("steps", "episodes", "eval_every", "save_every", "keep_last", "max_skipped_updates"):
            value = getattr(self, name)
            invalid = not isinstance(value, int) or isinstance(value, bool) or value < 1
            if invalid and (value is not None or name == "keep_last"):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        choices = {"on_spike": (None, *get_args(OnSpike)), "on_disk_error": get_args(OnDiskError)}
        for name, allowed in (choices | {"resume": (False, True, "auto")}).items():
            value = getattr(self, name)
            # Compare types, too: 0 == False, but is not a valid choice.
            if not any(value == choice and type(value) is type(choice) for choice in allowed):
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
        if self.resume is True and self.run_dir is None:
            raise ValueError("resume=True needs the run_dir of the run to resume")
        if self.eval_every is not None and self.eval_prompts is None:
            raise ValueError(f"eval_every={self.eval_every} needs eval_prompts")
        check_generation(self.generation)

    def target(self, batch_size: int) -> int:
        """Total steps of the run, for steps of `batch_size` samples over all processes."""
        return self.steps if self.steps is not None else math.ceil((self.episodes or 0) / batch_size)

    def evaluates_every(self, batch_size: int) -> int | None:
        """Steps between evaluations; None for no evaluation."""
        if self.eval_prompts is None:
            return None
        return self.eval_every or max(1, self.target(batch_size) // 20)

    def saves_every(self, batch_size: int) -> int | None:
        """Steps between checkpoints; None to save by the clock.

        With `on_spike="rollback"` the interval is always in steps, since rollbacks must not depend on timing.
        """
        if self.save_every is None and self.on_spike == "rollback":
            return max(1, self.target(batch_size) // 20)
        return self.save_every

    def generation_for(self, temperature: float, stops: Sequence[int]) -> dict[str, Any]:
        """Arguments of the trainer's `generate`; see the function `generation_for`."""
        return generation_for(self.generation, temperature, stops)


def generation_for(given: Mapping[str, Any] | None, temperature: float, stops: Sequence[int]) -> dict[str, Any]:
    """Arguments of the trainer's `generate`. The defaults sample from the distribution that the update scores."""
    settings: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "temperature": temperature,
        "max_new_tokens": 64,
    }
    if stops:
        settings["eos_token_id"] = list(stops)
    return settings | {"batch_size": 16} | dict(given or {})


def check_generation(given: Mapping[str, Any] | None) -> None:
    """Raises ValueError for arguments of `generate` that a managed run or an evaluation cannot use."""
    max_new_tokens = (given or {}).get("max_new_tokens", 1)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ValueError(f"generation: max_new_tokens={max_new_tokens!r} must be a whole number of at least 1")
    if "return_prompt" in (given or {}):
        raise ValueError("generation must not contain return_prompt: the loop needs responses without their prompts")
