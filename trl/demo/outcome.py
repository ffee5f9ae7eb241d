"""What a run is made of, and what it measured. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What a run is made of; times and results in docs/results/demo.md belong to the defaults."""

    seed: int = 0
    steps: int = 44
    """Calls of `PPOTrainer.step`."""
    batch_size: int = 64
    """Reviews written and learnt from in each of them."""
    minibatches: int = 4
    """Optimizer steps per pass over a batch; the batch must divide by it."""
    epochs: int = 2
    """Passes over each batch."""
    new_tokens: int = 48
    """Most tokens of a response."""
    temperature: float = 0.9
    """Of sampling, and of every log-probability."""
    learning_rate: float = 3e-4
    kl_coef: float = 0.05
    """First weight of the KL penalty; the controller moves it towards `kl_target`."""
    kl_target: float = 13.0
    """In nats per response."""
    kl_horizon: float = 400.0
    """Reviews over which the controller reacts."""
    vf_coef: float = 0.2
    cliprange_value: float = 2.0
    lam: float = 0.95
    shared_layers: int = 2
    score_clip: float = 3.5
    """Log-odds of POSITIVE beyond ± this (0.97) earn nothing more, so that there is no prize for shouting."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "minibatches", "epochs", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of {self.minibatches}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """What one step measured: a line of metrics.jsonl."""

    step: int  # from 1
    samples: int  # reviews so far
    positive: float  # mean P(POSITIVE) of the batch, sampled before this step's update
    positive_std: float
    kl: float  # mean over reviews of the sum over tokens of log p - log p_ref, in nats
    kl_coef: float
    response_tokens: float  # mean length
    entropy: float  # mean per token, in nats
    value_explained: float  # share of the returns' variance that the value head explains
    seconds: float  # of this step, sampling and scoring included


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """A held-out prompt and what the model made of it."""

    prompt: str
    response: str
    positive: float  # P(POSITIVE) of prompt + response


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What a model writes on the held-out prompts."""

    reviews: list[Review]
    positive: float  # mean P(POSITIVE)
    kl: float  # mean over reviews, nats per response
    perplexity: float  # of the responses under the reference
    distinct_2: float  # different word pairs / word pairs, over all responses


@dataclass(slots=True, kw_only=True)
class DemoResult:
    """Everything there is to report; what an interrupted run did not reach is missing."""

    settings: DemoSettings
    rows: list[StepRow] = field(default_factory=list)
    before: HeldOut | None = None
    after: HeldOut | None = None
    seconds: float = 0.0  # from the start of the process's work to the last step
    interrupted: bool = False
