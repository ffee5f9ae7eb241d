"""The vocabulary of the library: read this first.

Coordinates: `B` sequences, `T` tokens (query + response, padded; for an encoder-decoder the decoder's tokens),
`S = T - 1` predictions. Column `s` of a per-token array concerns token `s + 1` given the tokens up to `s`.
Per-token arrays are `[B, S]` and share one boolean `mask`, True where a response token is predicted and counts.
What stands off the mask is unspecified: it is never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound="Rollout | Experience")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Queries with their sampled responses, padded on either side: what an engine returns."""

    tokens: Tensor  # [B, T] int64
    attention: Tensor  # [B, T] bool, False on padding
    mask: Tensor  # [B, S] bool, True where a response token is predicted and counts
    group: Tensor = None  # type: ignore[assignment]  # [B] int64: rows of one number answer the same prompt; each its own if not given
    encoder_tokens: Tensor | None = None  # [B, Q] int64, the queries of an encoder-decoder
    encoder_attention: Tensor | None = None  # [B, Q] bool
    sampler_logprobs: Tensor | None = None  # [B, S] as the engine that sampled saw them
    values: Tensor | None = None  # [B, S] where the engine saw the critic's
    policy_version: int = 0  # which weights sampled it

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", torch.arange(len(self.tokens), device=self.tokens.device))

    def __len__(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one model says about a rollout."""

    logprobs: Tensor  # [B, S] log p(token s + 1 | tokens up to s)
    values: Tensor | None  # [B, S] value of the state in which token s + 1 is chosen
    entropy: Tensor | None  # [B, S] of the full distribution at s, in nats
    logits: Tensor | None = None  # [B, S, V], only where a caller asks for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout with everything that any algorithm's update needs."""

    rollout: Rollout
    scores: Tensor  # [B] one number per sequence, from the reward source
    old_logprobs: Tensor  # [B, S] anchor of the ratio
    ref_logprobs: Tensor | None  # [B, S]; None where no reference was asked
    advantages: Tensor  # [B, S] raw; whitening belongs to the update

    def __len__(self) -> int:
        return len(self.rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCritic(Experience):
    """The experience of an algorithm with a critic."""

    old_values: Tensor  # [B, S] before the update
    rewards: Tensor  # [B, S] score on the last response token, minus kl_coef * kl
    returns: Tensor  # [B, S] what the critic is to predict


E = TypeVar("E", bound=Experience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch(Generic[E]):
    """What one optimizer step sees."""

    experience: E  # advantages as the loss is to use them
    denominator: Tensor  # scalar: what the summed loss is divided by, the same on every process
    means: Mapping[str, Tensor] = field(default_factory=dict)  # scalars known before the update, for its metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A finished completion, as rewards see it."""

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...]  # the policy's tokens
    completion_ids: tuple[int, ...]
    columns: Mapping[str, Any]  # what else the dataset says about the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a reward says about `B` samples, in their order."""

    scores: list[float | None]  # B totals; None leaves the sample out
    components: dict[str, list[float | None]]  # by name: B raw values, before weights; the sum of a per-token reward
    token_rewards: list[list[float] | None]  # B times one number per completion token, on top of the score
    seconds: list[float]  # B durations of the calls that a sample was part of; 0 from a cache
    errors: list[str | None]  # B times one line; also where a penalty stands in for the score
    tracebacks: list[str | None] = field(default_factory=list)  # B times more about the error, where it is known

    def __len__(self) -> int:
        return len(self.scores)

    def statistics(self) -> dict[str, float]:
        """Per component the mean, standard deviation (of the population), least and largest value over the samples that
        have one, and the share that has none (`reward/<name>/mean`, ...); NaN over no samples. The share of samples
        with an error (`reward/errors`) and left out (`reward/excluded`).
        """
        count = max(len(self), 1)
        found: dict[str, float] = {}
        for name, values in self.components.items():
            known = [value for value in values if value is not None]
            mean = math.fsum(known) / len(known) if known else math.nan
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known)) if known else math.nan
            found |= {f"reward/{name}/mean": mean, f"reward/{name}/std": spread}
            found |= {f"reward/{name}/min": min(known, default=math.nan)}
            found |= {f"reward/{name}/max": max(known, default=math.nan)}
            found |= {f"reward/{name}/none": values.count(None) / count}
        found["reward/errors"] = sum(error is not None for error in self.errors) / count
        found["reward/excluded"] = self.scores.count(None) / count
        return found


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum and the number of things it sums: tallies add up, and are divided once, at the edge."""

    sum: Tensor  # scalar
    count: Tensor  # scalar

    @classmethod
    def of(cls, values: Tensor, mask: Tensor) -> Tally:
        """Tallies `values` [B, S] where `mask` [B, S] is True."""
        return cls(values.masked_fill(~mask, 0).sum(), mask.sum())

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sum + other.sum, self.count + other.count)

    def detach(self) -> Tally:
        """The same numbers without their graph."""
        return Tally(self.sum.detach(), self.count)

    def mean(self) -> Tensor:
        """Sum over count; 0 if nothing was counted."""
        return self.sum / self.count.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What a loss function returns for one microbatch: tallies only, so that how a batch is cut changes nothing."""

    objective: Tensor  # scalar: the sum over counted tokens of what is to be minimised
    metrics: Mapping[str, Tally]  # means over tokens, by statistics key
    arrays: Mapping[str, Tensor] = field(default_factory=dict)  # [B, S], detached, by statistics key


def take(batch: Batch, rows: Tensor | slice, columns: slice | None = None) -> Batch:
    """Selects rows, and cuts padding: columns of `batch` outside `columns` (token coordinates) are dropped.

    Args:
        batch: a Rollout or an Experience of `B` sequences.
        rows: indices [b] or a slice of the batch dimension.
        columns: a slice `lo:hi` of the token dimension `T`; per-token arrays keep their columns `lo:hi - 1`, and an
            encoder's tokens those that hold a token.

    Returns:
        The same type with `b` sequences.
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
    """The smallest slice of columns that holds every token of `attention` [B, T]."""
    columns = attention.any(dim=0).nonzero()
    if columns.numel() == 0:
        return slice(0, attention.shape[1])
    return slice(int(columns[0]), int(columns[-1]) + 1)


def identity(tensor: Tensor) -> Tensor:
    """The cross-process sum of a single process."""
    return tensor
