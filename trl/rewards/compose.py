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
from trl.rewards.signature import copy_samples
from trl.rewards.values import fits_float32
from trl.types import Sample, Scored

SingleSpec: TypeAlias = "Callable[..., Any] | str | Reward"
Spec: TypeAlias = "SingleSpec | Mapping[str, SingleSpec] | Sequence[SingleSpec]"


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
            raise ValueError("rewards is empty; expected at least one reward")
        if missing not in ("exclude", "leave_out"):
            raise ValueError(f"missing={missing!r} must be 'exclude' or 'leave_out'")
        weights = dict.fromkeys(rewards, 1.0) if weights is None else dict(weights)
        if set(weights) != set(rewards):
            raise ValueError(
                f"weights has the names {_quote_names(weights)}, but the rewards are {_quote_names(rewards)}"
            )
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
        results = {name: score_apart(reward, samples) for name, reward in self.rewards.items()}
        components: dict[str, list[float | None]] = {}
        for name, scored in results.items():
            is_single = list(scored.components) == [name] or len(scored.components) == 1
            components |= {(name if is_single else f"{name}/{key}"): value for key, value in scored.components.items()}
        count = range(len(samples))
        sums = [self._weighted_sum(results, i) for i in count]
        errors = [{name: scored.errors[i] for name, scored in results.items()} for i in count]
        traces = [{name: (scored.tracebacks or scored.errors)[i] for name, scored in results.items()} for i in count]
        return Scored(
            scores=[total for total, _, _ in sums],
            components=components,
            token_rewards=[tokens for _, tokens, _ in sums],
            seconds=[math.fsum(scored.seconds[i] for scored in results.values()) for i in count],
            errors=[_join_messages(errors[i], "; ", sums[i][2]) for i in count],
            tracebacks=[_join_messages(traces[i], "\n", sums[i][2]) for i in count],
        )

    def close(self) -> None:
        """Closes every reward."""
        for reward in self.rewards.values():
            reward.close()

    def _counted_names(self, results: Mapping[str, Scored], i: int) -> list[str]:
        """Returns the names of the rewards that count for sample `i`; empty if the sample is excluded."""
        unscored = [name for name, scored in results.items() if scored.scores[i] is None]
        if unscored and (self.missing == "exclude" or any(results[name].errors[i] is not None for name in unscored)):
            return []
        return [name for name in results if name not in unscored]

    def _weighted_sum(
        self, results: Mapping[str, Scored], i: int
    ) -> tuple[float | None, list[float] | None, str | None]:
        """Returns the score and token rewards of sample `i`, and the error if their sum overflows float32."""
        counted = self._counted_names(results, i)
        if not counted:
            return None, None, None
        values = [
            (self.weights[name], results[name].scores[i] or 0.0, results[name].token_rewards[i]) for name in counted
        ]
        scores = [weight * score for weight, score, _ in values]
        weighted = [[weight * reward for reward in tokens] for weight, _, tokens in values if tokens is not None]
        if fits_float32(*scores, *(reward for tokens in weighted for reward in tokens)):
            tokens = [math.fsum(column) for column in zip(*weighted, strict=True)] if weighted else None
            return math.fsum(scores), tokens, None
        terms = ", ".join(f"{self.weights[name]:g} x {name}" for name in counted)
        error = f"ValueError: the weighted sum {terms} overflows float32 (largest number 3.4e38)"
        if self.guard.on_error == "raise":
            raise RewardFailed(f"sample {i}: {error}")
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
        raise ValueError(f"weights={weights!r} applies to several rewards, but there is only one")
    if several and name is not None:
        raise ValueError(
            f"name={name!r} applies to a single reward, but there are several: pass a mapping to name them"
        )
    if several and not isinstance(cache, bool):
        raise ValueError(
            f"cache={cache!r} would mix the scores of several rewards: cache each one with as_reward(..., cache=) "
            "instead"
        )
    reward: Reward
    if isinstance(spec, Mapping | list | tuple):
        by_name = dict(spec) if isinstance(spec, Mapping) else _number_names(spec)
        single_rewards = {key: _single_reward(single_spec, key, guard, cache) for key, single_spec in by_name.items()}
        reward = RewardMix(single_rewards, _weights_by_name(weights, list(by_name)), missing, guard)
    else:
        reward = _single_reward(spec, name or _name_of(spec), guard, cache)
    return reward if budget is None else Budgeted(reward, budget)


def score_apart(reward: Reward, samples: Sequence[Sample]) -> Scored:
    """Scores samples with any reward; third-party rewards get copies of the columns and have their results validated.

    Raises:
        RewardFailed: if the result does not hold one finite score or None per sample.
        ColumnError: if a column cannot be copied.
    """
    if type(reward) in (FunctionReward, RewardMix, Budgeted):  # these copy and validate themselves
        return reward.score(samples)
    scored = reward.score(copy_samples(samples))
    _check_scored(scored, samples, type(reward).__name__)
    return scored


def _check_scored(scored: Scored, samples: Sequence[Sample], name: str) -> None:
    for field in ("scores", "token_rewards", "seconds", "errors"):
        if len(getattr(scored, field)) != len(samples):
            raise RewardFailed(f"{name} returned {len(getattr(scored, field))} {field} for {len(samples)} samples")
    for i, (score, tokens, sample) in enumerate(zip(scored.scores, scored.token_rewards, samples, strict=True)):
        if tokens is not None and len(tokens) != len(sample.completion_ids):
            raise RewardFailed(
                f"{name} returned {len(tokens)} token_rewards for the {len(sample.completion_ids)} tokens of sample {i}"
            )
        if score is not None and not fits_float32(score, *(tokens or ())):
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
        return [budget for inner in reward.rewards.values() for budget in budgets_of(inner)]
    return []


def _single_reward(spec: Any, name: str, guard: Guard, cache: Any) -> Reward:
    if isinstance(spec, nn.Module):
        raise ValueError(
            f"{name!r} is a model ({type(spec).__name__}); wrap it in ClassifierReward, with its tokenizer"
        )
    if callable(getattr(spec, "score", None)) and callable(getattr(spec, "close", None)):
        if guard != Guard() or cache:
            raise ValueError(
                f"reward {name!r} is already built: pass its error handling, isolation and cache where it is built"
            )
        return spec
    if not isinstance(spec, str) and not callable(spec):
        raise ValueError(f"reward {name!r} is of type {type(spec).__name__}; expected a function or 'module:function'")
    reward = FunctionReward(spec, name, guard)
    if cache is False:
        return reward
    score_cache = cache if isinstance(cache, ScoreCache) else ScoreCache(None if cache is True else cache)
    return CachedReward(reward, score_cache, ids=reward.reads_ids)


def _name_of(spec: Any) -> str:
    if isinstance(spec, str):
        return spec.rpartition(":")[2]
    name = getattr(spec, "__name__", None) or type(spec).__name__
    return "reward" if name == "<lambda>" else str(name)


def _number_names(specs: Sequence[Any]) -> dict[str, Any]:
    """Maps names to specs, numbering repeated names (`f`, `f_2`)."""
    named_specs: dict[str, Any] = {}
    for spec in specs:
        name, number = _name_of(spec), 1
        while (key := name if number == 1 else f"{name}_{number}") in named_specs:
            number += 1
        named_specs[key] = spec
    return named_specs


def _weights_by_name(weights: Any, names: Sequence[str]) -> Mapping[str, float] | None:
    if weights is None or isinstance(weights, Mapping):
        return weights
    if len(weights) != len(names):
        raise ValueError(f"got {len(weights)} weights for {len(names)} rewards: {_quote_names(names)}")
    return dict(zip(names, weights, strict=True))


def _join_messages(texts: Mapping[str, str | None], separator: str, extra: str | None) -> str | None:
    messages = [f"{name}: {text}" for name, text in texts.items() if text is not None]
    messages += [] if extra is None else [extra]
    return separator.join(messages) if messages else None


def _quote_names(names: Any) -> str:
    return ", ".join(map(repr, names))
