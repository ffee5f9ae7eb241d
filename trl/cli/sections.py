"""The sections of a configuration: one dataclass each. `ppo` is `PPOConfig` itself."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from trl.cli.problems import did_you_mean


@dataclass(kw_only=True)
class ModelSettings:
    """The model that is trained."""

    name: str | None = None
    """Folder, hub id, or `tiny-gpt2-reviews`, the film-review model in this package."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, if it is not the model's."""
    reference: str | None = None
    """Folder or hub id of the reference model; by default the model as it is before training."""
    shared_layers: int | None = None
    """Lowest layers that policy and reference share, frozen in both; saves memory and time."""
    trust_remote_code: bool = False
    """Run code from the model's repository."""
    allow_pickle: bool = False
    """Read weights from a `.bin` file if there are no safetensors."""


@dataclass(kw_only=True)
class LoraSettings:
    """LoRA adapter; without `r`, all weights are trained."""

    r: int | None = None
    """Rank of the adapter, such as 16. Needs peft."""
    alpha: int | None = None
    """The adapter's output is scaled by alpha / r; by default alpha is 2 r."""
    dropout: float = 0.0
    """Dropout before the adapter."""
    target_modules: list[str] | None = None
    """Names of the layers under the adapter; by default peft's choice for the architecture."""

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.r is None and (self.alpha is not None or self.target_modules is not None):
            name = "target_modules" if self.alpha is None else "alpha"
            raise ValueError(f"{name}={getattr(self, name)!r} needs r, the rank of the adapter")


@dataclass(kw_only=True)
class GRPOSettings:
    """GRPO, for `trl grpo`; learning rate, batch and group size are in `ppo`."""

    clip_range: float = 0.2
    """ε: clips the probability ratio to 1 ± this."""
    kl_coef: float = 0.04
    """β: weight of the KL to the reference in the loss; 0 needs no reference model."""

    def __post_init__(self) -> None:
        for name in ("clip_range", "kl_coef"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number of at least 0")


@dataclass(kw_only=True)
class RewardSettings:
    """The reward that scores completions. `reward: rewards.py:polite` is short for `functions`."""

    functions: dict[str, str] | list[str] | str = field(default_factory=dict)
    """Rewards by name, or a list, or one: `file.py:function`, `module:function`, `classifier:MODEL`, `length-penalty`,
    `format`, `math`, `remote:URL`."""
    weights: dict[str, float] | list[float] = field(default_factory=dict)
    """Weight of each reward, by name or in order; 1 if it has none."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments of a classifier or built-in reward, by the reward's name: `{sentiment: {label: POSITIVE}}`."""
    missing: Literal["exclude", "leave_out"] = "exclude"
    """If one of several rewards is None: exclude the sample, or leave out that reward."""
    on_error: Literal["raise", "skip", "penalty"] = "raise"
    """If a reward fails: end the run, leave out the sample, or score it `penalty`."""
    penalty: float | None = None
    """Score of a sample whose reward failed, with `on_error: penalty`."""
    isolation: Literal["none", "thread", "process"] = "none"
    """Where functions run; a process can be killed at its `timeout`."""
    timeout: float | None = None
    """Seconds per call, with isolation."""
    concurrency: int = 1
    """Concurrent calls."""
    rows_per_call: int | None = None
    """Samples per call, which fail together."""

    def __post_init__(self) -> None:
        self.functions = named(self.functions)
        if isinstance(self.weights, list):
            if len(self.weights) != len(self.functions):
                raise ValueError(
                    f"weights={self.weights} has {len(self.weights)} numbers for {len(self.functions)} rewards"
                )
            self.weights = dict(zip(self.functions, self.weights, strict=True))
        for setting in ("weights", "options"):
            for name in getattr(self, setting):
                if name not in self.functions:
                    raise ValueError(
                        f"{setting}={name!r} is no reward; the rewards are {', '.join(self.functions) or 'none'}"
                        + did_you_mean(name, self.functions)
                    )


def named(functions: dict[str, str] | list[str] | str) -> dict[str, str]:
    """Rewards by name: the name before `=`, else that of the function, classifier or built-in reward.

    Raises:
        ValueError: if two have one name.
    """
    if isinstance(functions, dict):
        return functions
    by_name: dict[str, str] = {}
    for text in [functions] if isinstance(functions, str) else functions:
        name, equals, source = text.partition("=")
        if not (equals and name.isidentifier()):
            name, source = re.split(r"[:/\\]", text.rstrip("/"))[-1] or text, text
        if name in by_name:
            raise ValueError(
                f"functions={text!r} has the name {name!r} of another reward: give it one, as in other={source}"
            )
        by_name[name] = source
    return by_name


@dataclass(kw_only=True)
class DataSettings:
    """Prompts. `data: prompts.jsonl` is short for `prompts`."""

    prompts: str | None = None
    """A .jsonl, .csv or .parquet file with a column prompt, query or messages; or `review-openings`, in this
    package."""
    eval_prompts: str | None = None
    """Held-out prompts, likewise."""
    held_out: int = 0
    """Prompts to take out of `prompts` and hold out instead; the same ones in every run."""

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"held_out={self.held_out} must be at least 0")
        if self.held_out and self.eval_prompts is not None:
            raise ValueError(f"held_out={self.held_out} and eval_prompts={self.eval_prompts!r}: set one of them")


@dataclass(kw_only=True)
class RowSettings:
    """Rows that an offline stage learns from. `data: rows.jsonl` is short for `dataset`."""

    dataset: str | None = None
    """A .jsonl, .csv or .parquet file, or a hub id, whose split `train` is taken; docs/sft.md and docs/dpo.md have the
    columns."""
    eval_dataset: str | None = None
    """Rows to evaluate on, likewise."""
    held_out: int = 0
    """Rows to take out of `dataset` and evaluate on instead; the same ones in every run."""

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise ValueError(f"held_out={self.held_out} must be at least 0")
        if self.held_out and self.eval_dataset is not None:
            raise ValueError(f"held_out={self.held_out} and eval_dataset={self.eval_dataset!r}: set one of them")


@dataclass(kw_only=True)
class TrainSettings:
    """The run: how long, where, and what it does about trouble."""

    steps: int | None = None
    """Steps, of `batch_size` samples each."""
    episodes: int | None = None
    """Samples, as an alternative to `steps`."""
    run_dir: str | None = None
    """Run folder; by default named after the configuration file, in `root`."""
    run_name: str | None = None
    """Name of the run folder in `root`, as an alternative to `run_dir`."""
    root: str = "runs"
    """Folder of all runs."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate: constant, or down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    eval_every: int | None = None
    """Steps between evaluations on held-out prompts, beside those before the first step and after the last; by default
    20 evaluations per run."""
    save_every: int | None = None
    """Steps between checkpoints; by default as often as costs under 1% of the time."""
    keep_last: int = 2
    """Recent checkpoints to keep."""
    keep_best: bool = True
    """Also keep the best checkpoint."""
    on_spike: Literal["warn", "skip", "rollback"] | None = "warn"
    """Response to a spike in KL or loss."""
    max_skipped_updates: int | None = 3
    """Non-finite optimizer steps in a row before the run fails."""
    on_disk_error: Literal["stop", "go_on"] = "stop"
    """Response to a full or read-only disk."""
    progress: bool | None = None
    """Show progress."""
    doctor: bool = True
    """Look for signs that the run cannot train well, before the first update and in every step."""

    def __post_init__(self) -> None:
        if self.run_dir is not None and self.run_name is not None:
            raise ValueError(f"run_dir={self.run_dir!r} and run_name={self.run_name!r}: set one of them")
        for name in ("steps", "episodes", "eval_every", "save_every", "keep_last", "max_skipped_updates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be at least 0")
        if self.steps is not None and self.episodes is not None:
            raise ValueError(f"steps={self.steps} and episodes={self.episodes}: set one of them")


@dataclass(kw_only=True)
class GenerationSettings:
    """How responses are sampled. Their temperature is `ppo.temperature`, which the update needs, too."""

    max_new_tokens: int = 64
    """Most tokens of a response."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: all. The update assumes 0."""
    top_p: float = 1.0
    """Sample from the most likely tokens of this total probability. The update assumes 1."""
    batch_size: int = 16
    """Responses sampled at the same time."""
    stop_strings: list[str] | None = None
    """Texts that end a response."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
