"""Core data types of the library. Read this first.

Dimensions: `B` sequences, `T` tokens (query + response, padded; decoder tokens for an encoder-decoder),
`S = T - 1` predictions. Column `s` of a per-token array refers to token `s + 1` given tokens `0..s`.
Per-token arrays are `[B, S]` and share one boolean `mask`, True where a response token is predicted and counts.
Values outside the mask are unspecified and never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Rows = TypeVar("Rows", bound="Rollout | Experience")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A batch of queries and their sampled responses, padded on either side, as returned by a rollout engine."""

    tokens: Tensor  # [B, T] int64
    attention: Tensor  # [B, T] bool, False on padding
    mask: Tensor  # [B, S] bool, True where a response token is predicted and counts
    group: Tensor = None  # type: ignore[assignment]  # [B] int64, same for responses to one prompt; default: all differ
    encoder_tokens: Tensor | None = None  # [B, Q] int64, encoder-decoder queries
    encoder_attention: Tensor | None = None  # [B, Q] bool
    sampler_logprobs: Tensor | None = None  # [B, S] log-probabilities computed by the sampling engine
    values: Tensor | None = None  # [B, S] critic values, if the engine computed them
    policy_version: int = 0  # version of the weights that sampled it

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", torch.arange(len(self.tokens), device=self.tokens.device))

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A request to a rollout engine: next-token distribution, where responses end, and the random numbers."""

    greedy: bool = False  # take the most likely token; ignores temperature, top_k, top_p and min_p
    temperature: float = 1.0
    top_k: int = 0  # keep this many of the most likely tokens; 0 keeps all
    top_p: float = 1.0  # then keep the most likely tokens up to this probability
    min_p: float = 0.0  # then keep tokens at least this many times as likely as the most likely one
    stops: tuple[int, ...] = ()  # ids of tokens that end a response
    least_tokens: int = 0  # minimum response length; stop tokens are masked before it
    limits: tuple[int, ...] = ()  # maximum new tokens of each response, one per query
    seed: int | None = None  # of this request's random numbers; None draws from torch's global generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model's per-token outputs on a rollout."""

    logprobs: Tensor  # [B, S] log p(token s + 1 | tokens up to s)
    values: Tensor | None  # [B, S] value of the state in which token s + 1 is chosen
    entropy: Tensor | None  # [B, S] of the full distribution at s, in nats
    logits: Tensor | None = None  # [B, S, V], only on request
    mean_logits: Tensor | None = None  # [B, S] mean over the vocabulary, detached, only on request
    top1: Tensor | None = None  # [B, S] bool: no token is more likely than token s + 1; only on request


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean, sum of squared deviations and count of all values seen so far."""

    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    count: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with Bessel's correction; 1 if fewer than two values were seen or all were equal."""
        var = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return var**0.5 if var > 0 else 1.0

    def __add__(self, other: Moments) -> Moments:
        """Moments of the values of both (parallel algorithm of Chan et al. 1979)."""
        if other.count == 0:
            return self
        delta, count = other.mean - self.mean, self.count + other.count
        return Moments(
            mean=self.mean + delta * other.count / count,
            squares=self.squares + other.squares + delta**2 * self.count * other.count / count,
            count=count,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout plus everything that every algorithm's update needs."""

    rollout: Rollout
    scores: Tensor  # [B] one number per sequence, from the reward source
    old_logprobs: Tensor  # [B, S] denominator of the probability ratio
    ref_logprobs: Tensor | None  # [B, S]; None if no reference was evaluated
    advantages: Tensor  # [B, S] raw; the update does any whitening
    entropy: Tensor | None = None  # [B, S] of the policy before the update, in nats; None if unknown

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def counted(self) -> Tensor:
        """`[B]` bool, False for a sequence without a counted token."""
        return self.rollout.mask.any(dim=1)

    @property
    def kl(self) -> Tensor | None:
        """`[B]` KL of each sequence to the reference, before the update: log p - log q, summed over counted tokens."""
        if self.ref_logprobs is None:
            return None
        return (self.old_logprobs - self.ref_logprobs).masked_fill(~self.rollout.mask, 0).sum(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCritic(Experience):
    """Experience for an algorithm with a critic."""

    old_values: Tensor  # [B, S] critic values before the update
    rewards: Tensor  # [B, S] score on the last response token, minus kl_coef * kl
    non_score_reward: Tensor  # [B, S] the rewards' KL penalty alone
    returns: Tensor  # [B, S] value targets
    score_moments: Moments = field(default_factory=Moments)  # of this batch's scores, if scores are scaled


E = TypeVar("E", bound=Experience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch(Generic[E]):
    """The data for one optimizer step."""

    experience: E  # advantages are final, e.g. whitened
    denominator: Tensor  # scalar divisor of the summed loss, the same on every process
    means: Mapping[str, Tensor] = field(default_factory=dict)  # scalars known before the update, for its metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A finished completion, as passed to rewards."""

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]  # in the policy's tokenization, like completion_ids
    completion_ids: tuple[int, ...]
    columns: Mapping[str, Any]  # the prompt's other dataset columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A reward's scores for `B` samples, in sample order."""

    scores: list[float | None]  # B totals; None excludes the sample
    components: dict[str, list[float | None]]  # name -> B raw values, unweighted; per-token rewards are summed
    token_rewards: list[list[float] | None]  # B lists, one number per completion token, added to the score
    seconds: list[float]  # B durations of the calls that scored each sample; 0 on a cache hit
    errors: list[str | None]  # B one-line errors or None, set even if a penalty replaces the score
    tracebacks: list[str | None] = field(default_factory=list)  # B longer error details, where known

    def __len__(self) -> int:
        return len(self.scores)

    def statistics(self) -> dict[str, float]:
        """Summary statistics by key.

        For each component: `reward/<name>/mean`, `std` (population), `min` and `max` over the samples with a value (NaN
        if there are none), and `none`, the fraction without one. Overall: `reward/errors` and `reward/excluded`, the
        fractions of samples with an error and without a score.
        """
        count = max(len(self), 1)
        result: dict[str, float] = {}
        for name, values in self.components.items():
            known = [value for value in values if value is not None]
            mean, std = mean_and_std(known)
            result |= {f"reward/{name}/mean": mean, f"reward/{name}/std": std}
            result |= {f"reward/{name}/min": min(known, default=math.nan)}
            result |= {f"reward/{name}/max": max(known, default=math.nan)}
            result |= {f"reward/{name}/none": values.count(None) / count}
        result["reward/errors"] = sum(error is not None for error in self.errors) / count
        result["reward/excluded"] = self.scores.count(None) / count
        return result


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum and the number of its terms. Tallies add up and are divided only once, at the end."""

    sum: Tensor  # scalar
    count: Tensor  # scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Tally:
        """Tallies `values` [B, S] where `mask` [B, S] is True."""
        return cls(values.masked_fill(~mask, 0).sum(), mask.sum())

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sum + other.sum, self.count + other.count)

    def detach(self) -> Tally:
        """Detaches the sum from the autograd graph."""
        return Tally(self.sum.detach(), self.count)

    def mean(self) -> Tensor:
        """Sum over count; 0 if nothing was counted."""
        return self.sum / self.count.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A loss function's result on one microbatch: sums only, so splitting a batch differently does not change it."""

    objective: Tensor  # scalar: the quantity to minimise, summed over counted tokens
    metrics: Mapping[str, Tally]  # token means, by statistics key
    arrays: Mapping[str, Tensor] = field(default_factory=dict)  # [B, S], detached, by statistics key


def take(batch: Rows, rows: Tensor | slice, columns: slice | None = None) -> Rows:
    """Selects rows of a batch and, given `columns`, trims its padding.

    Args:
        batch: a Rollout or an Experience of `B` sequences.
        rows: `[b]` indices or a slice of the batch dimension.
        columns: a slice `lo:hi` of the token dimension `T` to keep. Per-token arrays keep columns `lo:hi - 1`; encoder
            inputs are trimmed to the columns with tokens.

    Returns:
        A batch of the same type with `b` sequences.
    """
    width = (batch if isinstance(batch, Rollout) else batch.rollout).tokens.shape[1]
    changes: dict[str, Any] = {}
    for name in (f.name for f in fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, Rollout):
            changes[name] = take(value, rows, columns)
        elif isinstance(value, Tensor):
            value = value[rows]
            if columns is not None and value.dim() > 1 and not name.startswith("encoder_"):
                end = columns.stop if value.shape[1] == width else columns.stop - 1
                value = value[:, columns.start : end]
            changes[name] = value
    if columns is not None and changes.get("encoder_attention") is not None:
        used = occupied(changes["encoder_attention"])
        changes |= {name: changes[name][:, used] for name in ("encoder_tokens", "encoder_attention")}
    return replace(batch, **changes)


def occupied(attention: Tensor) -> slice:
    """The smallest column slice that covers every token of `attention` `[B, T]`; all columns if there are no tokens."""
    columns = attention.any(dim=0).nonzero()
    if columns.numel() == 0:
        return slice(0, attention.shape[1])
    return slice(int(columns[0]), int(columns[-1]) + 1)


def widen(array: Tensor, columns: slice, width: int) -> Tensor:
    """Undoes the trimming of `take`: pads a per-token array of the tokens in `columns` back to `width` with zeros.

    Args:
        array: `[b, s, ...]`.
        columns: the slice of the token dimension that `take` was given.
        width: `S`, predictions before trimming.

    Returns:
        `[b, S, ...]`.
    """
    wide = array.new_zeros(array.shape[0], width, *array.shape[2:])
    wide[:, columns.start : columns.stop - 1] = array
    return wide


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population standard deviation; NaN without values."""
    if not values:
        return math.nan, math.nan
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def identity(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process: returns `tensor` unchanged."""
    return tensor
