"""Turns user-supplied rewards into one `Reward`; combines several in a weighted sum."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import nn

from trl.protocols import Reward
from trl.rewards.cache import CachedReward, ScoreCache
from trl.rewards.failures import ErrorBudget, RewardFailed
from trl.rewards.function import FunctionReward, Guard
from trl.rewards.signature import copied
from trl.rewards.values import fits
from trl.types import Sample, Scored

One: TypeAlias = "Callable[..., Any] | str | Reward"
Spec: TypeAlias = "One | Mapping[str, One] | Sequence[One]"


class RewardMix:
    """A weighted sum of rewards.

    By default, a sample that any reward scores None gets None overall: dropping the term would count it as 0. With
    `missing="leave_out"`, a None without an error only drops that reward from the sample's sum, for rewards that each
    apply to some of the samples; a sample that every reward scores None gets None.

    Args:
        rewards: rewards by name; the name labels the reward's component in statistics.
        weights: one weight per reward, by name; None weights each 1.
        missing: how to treat None from one of the rewards: "exclude" the sample, or "leave_out" the reward.
        guard: its `on_error` and `penalty` apply to weighted sums that overflow float32.

    Raises:
        ValueError: if there are no rewards, the weights have other names, or a weight is not finite.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        missing: Literal["exclude", "leave_out"] = "exclude",
        guard: Guard | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("there is no reward in the mix")
        if missing not in ("exclude", "leave_out"):
            raise ValueError(f"missing={missing!r} must be 'exclude' or 'leave_out'")
        weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if set(weights) != set(rewards):
            raise ValueError(f"weights are of {_listed(weights)}; the rewards are {_listed(rewards)}")
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight}; expected a finite number")
        self.rewards = dict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}
        self.missing = missing
        self.guard = guard or Guard()

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores samples with each reward in turn and sums the results; errors are prefixed with the reward's name.

        Raises:
            RewardFailed: if a weighted sum overflows float32 and `on_error` is "raise".
        """
        parts = {name: score_apart(reward, samples) for name, reward in self.rewards.items()}
        components: dict[str, list[float | None]] = {}
        for name, part in parts.items():
            own = list(part.components) == [name] or len(part.components) == 1
            components |= {(name if own else f"{name}/{key}"): value for key, value in part.components.items()}
        count = range(len(samples))
        sums = [self._summed(parts, i) for i in count]
        errors = [{name: part.errors[i] for name, part in parts.items()} for i in count]
        traces = [{name: (part.tracebacks or part.errors)[i] for name, part in parts.items()} for i in count]
        return Scored(
            scores=[total for total, _, _ in sums],
            components=components,
            token_rewards=[tokens for _, tokens, _ in sums],
            seconds=[math.fsum(part.seconds[i] for part in parts.values()) for i in count],
            errors=[_joined(errors[i], "; ", sums[i][2]) for i in count],
            tracebacks=[_joined(traces[i], "\n", sums[i][2]) for i in count],
        )

    def close(self) -> None:
        """Closes every reward."""
        for reward in self.rewards.values():
            reward.close()

    def _kept(self, parts: Mapping[str, Scored], i: int) -> list[str]:
        """Returns the names of the rewards that count for sample `i`; empty if the sample is excluded."""
        absent = [name for name, part in parts.items() if part.scores[i] is None]
        if absent and (self.missing == "exclude" or any(parts[name].errors[i] is not None for name in absent)):
            return []
        return [name for name in parts if name not in absent]

    def _summed(self, parts: Mapping[str, Scored], i: int) -> tuple[float | None, list[float] | None, str | None]:
        """Returns the score and token rewards of sample `i`, and the error if their sum overflows float32."""
        kept = self._kept(parts, i)
        if not kept:
            return None, None, None
        values = [(self.weights[name], parts[name].scores[i] or 0.0, parts[name].token_rewards[i]) for name in kept]
        scores = [weight * score for weight, score, _ in values]
        weighted = [[weight * reward for reward in tokens] for weight, _, tokens in values if tokens is not None]
        if fits(*scores, *(reward for tokens in weighted for reward in tokens)):
            tokens = [math.fsum(column) for column in zip(*weighted, strict=True)] if weighted else None
            return math.fsum(scores), tokens, None
        terms = ", ".join(f"{self.weights[name]:g} x {name}" for name in kept)
        error = f"ValueError: the weighted sum {terms} is more than float32 can hold (up to 3.4e38)"
        if self.guard.on_error == "raise":
            raise RewardFailed(f"{error}, for sample {i}")
        return self.guard.penalty, None, error


class Budgeted:
    """Wraps a reward and counts its errors against an error budget."""

    def __init__(self, reward: Reward, budget: ErrorBudget) -> None:
        self.reward = reward
        self.budget = budget

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores samples.

        Raises:
            RewardErrors: if the errors exceed the budget.
        """
        scored = score_apart(self.reward, samples)
        self.budget.record(scored)
        return scored

    def close(self) -> None:
        """Closes the reward."""
        self.reward.close()


def as_reward(
    spec: Spec,
    *,
    name: str | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    missing: Literal["exclude", "leave_out"] = "exclude",
    on_error: Literal["raise", "skip", "penalty"] = "raise",
    penalty: float | None = None,
    isolation: Literal["none", "thread", "process"] = "none",
    timeout: float | None = None,
    start_timeout: float = 120.0,
    concurrency: int = 1,
    rows_per_call: int | None = None,
    cache: bool | str | os.PathLike[str] | ScoreCache = False,
    budget: ErrorBudget | None = None,
) -> Reward:
    """Builds a single `Reward` from a function, a path, a reward, or several of these.

    Args:
        spec: a function or callable object (see `FunctionReward`); "module:function"; a reward (anything with `score`
            and `close`), which keeps its own settings; or several of these, as a mapping by name or a sequence.
        name: component name of a single function in statistics; None uses the function's name.
        weights: weights of several rewards, by name or in order; None weights each 1.
        missing: how to treat None from one of several rewards; see `RewardMix`.
        on_error: how to treat failures; see `Guard` for this and the next six arguments.
        penalty: score of a sample whose reward failed, for `on_error="penalty"`.
        isolation: where functions run.
        timeout: seconds per call.
        start_timeout: seconds for a worker process to start.
        concurrency: concurrent calls.
        rows_per_call: samples per call.
        cache: True caches functions' scores in memory, so that equal samples are scored once; a path also persists
            them in that JSONL file (single function only: a file holds one function's scores); or a `ScoreCache`.
        budget: stops the run when too many samples fail.

    Raises:
        ValueError: if `spec` is none of these, or an argument does not apply to it.
    """
    guard = Guard(
        on_error=on_error, penalty=penalty, isolation=isolation, timeout=timeout,
        start_timeout=start_timeout, concurrency=concurrency, rows_per_call=rows_per_call,
    )  # fmt: skip
    several = isinstance(spec, Mapping | list | tuple)
    if not several and weights is not None:
        raise ValueError(f"weights={weights!r} go with several rewards; there is one")
    if several and name is not None:
        raise ValueError(f"name={name!r} goes with a single reward; there are several")
    if several and not isinstance(cache, bool):
        raise ValueError(
            f"cache={cache!r} would mix the scores of several rewards: wrap each in as_reward(..., cache=)"
        )
    reward: Reward
    if isinstance(spec, Mapping | list | tuple):
        by_name = dict(spec) if isinstance(spec, Mapping) else _named(spec)
        leaves = {key: _leaf(one, key, guard, cache) for key, one in by_name.items()}
        reward = RewardMix(leaves, _by_name(weights, list(by_name)), missing, guard)
    else:
        reward = _leaf(spec, name or _name_of(spec), guard, cache)
    return reward if budget is None else Budgeted(reward, budget)


def score_apart(reward: Reward, samples: Sequence[Sample]) -> Scored:
    """Scores samples with any reward; third-party rewards get copies of the columns and have their results validated.

    Raises:
        RewardFailed: if the result does not hold one finite score or None per sample.
        ColumnError: if a column cannot be copied.
    """
    if type(reward) in (FunctionReward, RewardMix, Budgeted):  # these copy and validate themselves
        return reward.score(samples)
    scored = reward.score(copied(samples))
    _check_answer(scored, samples, type(reward).__name__)
    return scored


def _check_answer(scored: Scored, samples: Sequence[Sample], name: str) -> None:
    for field in ("scores", "token_rewards", "seconds", "errors"):
        if len(getattr(scored, field)) != len(samples):
            raise RewardFailed(f"{name} returned {len(getattr(scored, field))} {field} for {len(samples)} samples")
    for i, (score, tokens, sample) in enumerate(zip(scored.scores, scored.token_rewards, samples, strict=True)):
        if tokens is not None and len(tokens) != len(sample.completion_ids):
            raise RewardFailed(
                f"{name} returned {len(tokens)} token_rewards for the {len(sample.completion_ids)} tokens of sample {i}"
            )
        if score is not None and not fits(score, *(tokens or ())):
            raise RewardFailed(
                f"{name} returned the score {score} for sample {i}, with {len(tokens or ())} token_rewards; expected "
                "finite numbers that float32 can hold (up to 3.4e38)"
            )


def budgets_of(reward: Reward) -> list[ErrorBudget]:
    """Returns every error budget inside a reward for checkpointing, in an order determined by its structure."""
    if isinstance(reward, Budgeted):
        return [reward.budget, *budgets_of(reward.reward)]
    if isinstance(reward, CachedReward):
        return budgets_of(reward.reward)
    if isinstance(reward, RewardMix):
        return [budget for one in reward.rewards.values() for budget in budgets_of(one)]
    return []


def _leaf(spec: Any, name: str, guard: Guard, cache: Any) -> Reward:
    if isinstance(spec, nn.Module):
        raise ValueError(
            f"{name!r} is a model ({type(spec).__name__}); wrap it in ClassifierReward, with its tokenizer"
        )
    if callable(getattr(spec, "score", None)) and callable(getattr(spec, "close", None)):
        if guard != Guard() or cache:
            raise ValueError(f"reward {name!r} is made already: give it its guard and cache where it is made")
        return spec
    if not isinstance(spec, str) and not callable(spec):
        raise ValueError(f"reward {name!r} is of type {type(spec).__name__}; expected a function or 'module:function'")
    reward = FunctionReward(spec, name, guard)
    if cache is False:
        return reward
    kept = cache if isinstance(cache, ScoreCache) else ScoreCache(None if cache is True else cache)
    return CachedReward(reward, kept, ids=reward.reads_ids)


def _name_of(spec: Any) -> str:
    if isinstance(spec, str):
        return spec.rpartition(":")[2]
    name = getattr(spec, "__name__", None) or type(spec).__name__
    return "reward" if name == "<lambda>" else str(name)


def _named(specs: Sequence[Any]) -> dict[str, Any]:
    """Maps names to specs, numbering repeated names (`f`, `f_2`)."""
    found: dict[str, Any] = {}
    for spec in specs:
        name, number = _name_of(spec), 1
        while (key := name if number == 1 else f"{name}_{number}") in found:
            number += 1
        found[key] = spec
    return found


def _by_name(weights: Any, names: Sequence[str]) -> Mapping[str, float] | None:
    if weights is None or isinstance(weights, Mapping):
        return weights
    if len(weights) != len(names):
        raise ValueError(f"there are {len(weights)} weights for {len(names)} rewards: {_listed(names)}")
    return dict(zip(names, weights, strict=True))


def _joined(texts: Mapping[str, str | None], between: str, last: str | None) -> str | None:
    said = [f"{name}: {text}" for name, text in texts.items() if text is not None]
    said += [] if last is None else [last]
    return between.join(said) if said else None


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
