"""Settings and results of a demo run. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

TASK = "demo"
"""`PPOConfig.task_name` of the demo's runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Settings of a run; docs/results/demo.md reports times and results for the defaults."""

    seed: int = 0
    steps: int = 44
    """PPO steps."""
    batch_size: int = 64
    """Reviews sampled and trained on per step."""
    minibatches: int = 4
    """Optimizer steps per pass over a batch; must divide `batch_size`."""
    epochs: int = 2
    """Passes over each batch."""
    new_tokens: int = 48
    """Maximum tokens per response."""
    temperature: float = 0.9
    """Temperature of sampling and of all logprobs."""
    learning_rate: float = 3e-4
    kl_coef: float = 0.05
    """Initial KL penalty coefficient; the controller adapts it to reach `kl_target`."""
    kl_target: float = 13.0
    """Target KL to the reference, in nats per response."""
    kl_horizon: float = 400.0
    """Time constant of the KL controller, in reviews."""
    vf_coef: float = 0.2
    cliprange_value: float = 2.0
    lam: float = 0.95
    shared_layers: int = 2
    score_clip: float = 3.5
    """Clips the score, the log-odds of POSITIVE, to ± this (P = 0.97), so that extreme reviews earn no extra."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "minibatches", "epochs", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of minibatches={self.minibatches}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A held-out prompt with the model's response."""

    prompt: str
    response: str
    positive: float  # P(POSITIVE) of prompt + response


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Responses to the held-out prompts, with metrics."""

    reviews: list[Review]  # a response to every prompt, then the next response to every prompt, ...
    positive: float  # mean P(POSITIVE)
    kl: float  # mean over reviews, nats per response
    perplexity: float  # of the responses under the reference
    distinct_2: float  # distinct word bigrams / all word bigrams, over all responses


@dataclass(slots=True, kw_only=True)
class DemoResult:
    """Results to report; partial if the run was interrupted."""

    settings: DemoSettings
    steps: int = 0
    """Steps done."""
    before: HeldOut | None = None
    after: HeldOut | None = None
    seconds: float = 0.0  # from program start to the end of the final evaluation, or to the interrupt
    interrupted: bool = False
