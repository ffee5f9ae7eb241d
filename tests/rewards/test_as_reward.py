from __future__ import annotations

import asyncio
import functools
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import assert_close
from tests.rewards import hostile
from tests.rewards.samples import sample, samples
from trl.rewards import (
    CachedReward,
    ErrorBudget,
    FunctionReward,
    Guard,
    RewardErrors,
    RewardFailed,
    RewardMix,
    ScoreCache,
    Scored,
    as_reward,
)
from trl.rewards.failures import ColumnError

BATCH = [
    sample("one two", prompt="p0", answer=3, more=10),
    sample("three", prompt="p1", answer=5, more=20),
]


def scores(function: Any, batch: Any = BATCH, **settings: Any) -> list[float | None]:
    reward = as_reward(function, **settings)
    try:
        return reward.score(batch).scores
    finally:
        reward.close()


# How functions are called.


def test_prompts_and_completions_by_position_or_name() -> None:
    expected = [9.0, 7.0]  # len("one two") + len("p0"), len("three") + len("p1")
    assert scores(lambda prompts, completions: [len(p) + len(c) for p, c in zip(prompts, completions)]) == expected
    assert scores(lambda p, c, /: [len(p[i]) + len(c[i]) for i in range(2)]) == expected
    assert scores(lambda *texts: [len(texts[0][i]) + len(texts[1][i]) for i in range(2)]) == expected
    assert scores(lambda completions, prompts: [len(p) + len(c) for p, c in zip(prompts, completions)]) == expected
    assert scores(lambda completions: [len(c) for c in completions]) == [7.0, 5.0]


def test_columns_as_far_as_the_signature_takes_them() -> None:
    seen: dict[str, Any] = {}

    def some(prompts: Any, completions: Any, answer: Any, absent: Any = "default") -> Any:
        seen.update(answer=answer, absent=absent)
        return answer

    def every(prompts: Any, completions: Any, **columns: Any) -> Any:
        seen.update(columns=columns)
        return columns["more"]

    assert scores(some) == [3.0, 5.0]
    assert seen == {"answer": [3, 5], "absent": "default"}
    assert scores(every) == [10.0, 20.0]
    assert seen["columns"] == {"answer": [3, 5], "more": [10, 20]}


def test_a_column_that_some_samples_lack_is_none_there() -> None:
    batch = [sample("a", hint="x"), sample("b")]
    assert scores(lambda prompts, completions, hint: [1.0 if h is None else 2.0 for h in hint], batch) == [2.0, 1.0]


@pytest.mark.parametrize("calls", [{"rows_per_call": 1}, {"concurrency": 2}])
def test_a_column_that_the_samples_of_one_call_lack_is_none_there(calls: dict[str, Any]) -> None:
    def with_default(prompts: Any, completions: Any, hint: Any = "none of them has it") -> Any:
        return [5.0 if hint == "none of them has it" else 1.0 if h is None else 2.0 for h in hint][: len(prompts)]

    batch = [sample("a", hint="x"), sample("b")]
    assert scores(with_default, batch, **calls) == [2.0, 1.0]
    assert scores(lambda prompts, completions, hint: [float(h is None) for h in hint], batch, **calls) == [0.0, 1.0]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_column_that_is_missing_is_told_whatever_on_error_is(on_error: Any) -> None:
    def needs(prompts: Any, completions: Any, solution: Any) -> Any:
        return solution

    with pytest.raises(
        ColumnError, match="reward 'needs' needs the column 'solution'; the prompts have 'answer', 'more'"
    ):
        scores(needs, on_error=on_error)


def test_token_ids_if_named() -> None:
    def ids(prompts: Any, completions: Any, prompt_ids: Any, completion_ids: Any) -> Any:
        return [p[0] + sum(c) for p, c in zip(prompt_ids, completion_ids)]

    assert scores(ids) == [10.0, 8.0]  # 7 + 1 + 2, 7 + 1


def test_samples() -> None:
    assert scores(hostile.of_samples) == [5.0, 6.0]
    assert scores(hostile.of_samples, isolation="process") == [5.0, 6.0]


def test_asynchronous_with_and_without_a_running_loop() -> None:
    assert scores(hostile.asynchronous) == [7.0, 5.0]
    assert scores(hostile.asynchronous, isolation="thread", timeout=30) == [7.0, 5.0]

    async def inside() -> Any:
        return scores(hostile.asynchronous)

    assert asyncio.run(inside()) == [7.0, 5.0]


def test_process_gets_what_the_function_gets_here() -> None:
    assert scores(hostile.with_columns) == scores(hostile.with_columns, isolation="process") == [13.0, 25.0]
    assert scores("tests.rewards.hostile:an_object", isolation="process") == [7.0, 5.0]
    assert scores("tests.rewards.hostile:length") == [7.0, 5.0]
    with pytest.raises(ColumnError, match="'answer'"):
        scores(hostile.with_columns, samples("one"), isolation="process", on_error="skip")
    odd = [sample("a", answer=object(), more=1)]
    with pytest.raises(ColumnError, match="cannot be sent to its worker process as JSON"):
        scores(hostile.with_columns, odd, isolation="process", on_error="skip")


def test_a_worker_does_without_torch() -> None:
    reward = as_reward("sys:intern", isolation="process")
    with pytest.raises(Exception, match="has the signature"):
        reward.score(BATCH)
    code = "import trl.rewards.worker, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda prompts, completions: [1.0], "is a lambda"),
        (functools.partial(hostile.length), "a partial object cannot run with isolation='process'"),
        (hostile.Scorer(), "a Scorer object cannot run with isolation='process'"),
    ],
)
def test_a_process_needs_a_name_to_find_the_function_by(function: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason + r".*top level of a module.*'module:function'"):
        as_reward(function, isolation="process")


def test_a_process_finds_no_local_nor_the_scripts_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    def local(prompts: Any, completions: Any) -> Any:
        return completions

    with pytest.raises(ValueError, match="is defined inside another function"):
        as_reward(local, isolation="process")
    other = functools.wraps(hostile.length)(lambda prompts, completions: [0.0])
    with pytest.raises(ValueError, match="hostile:length is not this reward"):
        as_reward(other, isolation="process")
    local.__module__, local.__qualname__ = "__main__", "local"
    with pytest.raises(ValueError, match="is defined in the main script"):
        as_reward(local, isolation="process")


# What functions return.


@pytest.mark.parametrize(
    "values",
    [[1, None], (True, None), [np.float32(1), None], [torch.tensor(1.0), None], [torch.ones(1)[0], None]],
)
def test_numbers_and_none(values: Any) -> None:
    scored = as_reward(lambda prompts, completions: values).score(BATCH)
    assert scored.scores == [1.0, None] and type(scored.scores[0]) is float
    assert scored.errors == [None, None]  # unscorable is no error
    assert scored.token_rewards == [None, None]


@pytest.mark.parametrize("values", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)])
def test_arrays(values: Any) -> None:
    assert scores(lambda prompts, completions: values) == [1.0, 2.0]


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_rewards_of_tokens(isolation: Any) -> None:
    batch = [sample("one two", ids=(4, 6)), sample("three", ids=(3,)), sample("", ids=())]
    reward = as_reward(hostile.per_token, isolation=isolation)
    scored = reward.score(batch)
    reward.close()
    assert scored.token_rewards == [[2.0, 3.0], [1.5], []]
    assert scored.scores == [0.0, 0.0, 0.0]  # nothing beside them, and they are not counted twice
    assert scored.components == {"per_token": [5.0, 1.5, 0.0]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1.0], "ValueError: the reward has 1 values for a completion of 2 tokens"),
        ([1.0, math.inf], "ValueError: the reward of token 1 is inf; expected a finite number"),
        ([1.0, None], "TypeError: the reward of token 1 is None; expected a number"),
        (10**400, "ValueError: the score is a whole number too large for a float"),
        ({"score": 1}, "TypeError: the score is an object of type dict; expected a number"),
        (LookupError("judge is ill"), "LookupError: judge is ill"),
    ],
)
def test_rows_that_are_no_score(row: Any, said: str) -> None:
    scored = as_reward(lambda prompts, completions: [row, 2.0], on_error="skip").score(BATCH)
    assert scored.scores == [None, 2.0]
    assert scored.token_rewards == [None, None]
    assert scored.errors == [said, None]


def test_no_samples() -> None:
    for reward in (as_reward(hostile.length), as_reward([hostile.length] * 2, cache=True), as_reward(hostile.raises)):
        assert reward.score([]).scores == []
        assert len(reward.score([])) == 0


# Concurrency.


@pytest.mark.parametrize("isolation", ["none", "thread"])
def test_concurrent_calls_keep_the_order(isolation: Any) -> None:
    together = threading.Barrier(4, timeout=20)

    def slow(prompts: Any, completions: list[str]) -> list[float]:
        together.wait()  # four calls at a time, or none gets past
        time.sleep(0.02 * (5 - len(completions[0])))  # the first is done last
        return [float(len(text)) for text in completions]

    batch = samples("a", "bb", "ccc", "dddd")
    assert scores(slow, batch, concurrency=4, isolation=isolation) == [1.0, 2.0, 3.0, 4.0]


def test_concurrent_processes() -> None:
    reward = as_reward(hostile.length, isolation="process", concurrency=2, rows_per_call=1)
    assert reward.score(samples("a", "bb", "ccc", "dddd")).scores == [1.0, 2.0, 3.0, 4.0]
    reward.close()


def test_the_first_failure_is_raised_whichever_comes_first() -> None:
    def fails(prompts: Any, completions: list[str]) -> Any:
        time.sleep(0.05 * (3 - len(completions[0])))
        raise ValueError(completions[0])

    for _ in range(3):
        with pytest.raises(RuntimeError, match="on the completion 'a': ValueError: a"):
            scores(fails, samples("a", "bb", "ccc"), concurrency=3)


# Several rewards.


def constant(*values: Any) -> Any:
    return lambda prompts, completions: list(values)


def test_weighted_sum_worked_by_hand() -> None:
    reward = as_reward({"a": constant(1.0, 2.0), "b": constant(10.0, 20.0)}, weights={"b": 0.5, "a": -1})
    scored = reward.score(BATCH)
    assert scored.scores == [4.0, 8.0]  # -1 + 5, -2 + 10
    assert scored.components == {"a": [1.0, 2.0], "b": [10.0, 20.0]}
    assert list(scored.components) == ["a", "b"]
    assert scores([constant(1.0, 2.0), constant(10.0, 20.0)]) == [11.0, 22.0]
    assert scores([constant(1.0, 2.0), constant(10.0, 20.0)], weights=[2, 1]) == [12.0, 24.0]


def test_rewards_of_tokens_are_weighted_and_added() -> None:
    spec = {"a": constant([1.0, 2.0], None), "b": constant([10.0, 20.0], [3.0]), "c": constant(7.0, 7.0)}
    scored = as_reward(spec, weights={"a": 2, "b": 0.5, "c": 1}).score(BATCH)
    assert scored.token_rewards == [[7.0, 14.0], None]
    assert scored.scores == [7.0, None]


def test_none_from_one_of_several() -> None:
    spec = {"a": constant(1.0, None), "b": constant(None, None)}
    assert scores(spec) == [None, None]
    assert scores(spec, missing="leave_out") == [1.0, None]


def test_a_failure_of_one_of_several_is_never_left_out() -> None:
    spec = {"a": constant(1.0, 2.0), "b": constant(math.nan, 3.0)}
    scored = as_reward(spec, missing="leave_out", on_error="skip").score(BATCH)
    assert scored.scores == [None, 5.0]
    assert scored.errors == ["b: ValueError: the score is nan; expected a finite number", None]
    assert as_reward(spec, on_error="penalty", penalty=-4.0).score(BATCH).scores == [-3.0, 5.0]


def test_names() -> None:
    mix = as_reward([hostile.length, "tests.rewards.hostile:length", hostile.Scorer(), lambda p, c: [1.0, 1.0]])
    assert list(mix.score(BATCH).components) == ["length", "length_2", "Scorer", "reward"]
    nested = as_reward({"outer": as_reward({"x": constant(1, 2), "y": constant(3, 4)}), "z": constant(5, 6)})
    assert nested.score(BATCH).components == {"outer/x": [1, 2], "outer/y": [3, 4], "z": [5, 6]}
    assert nested.score(BATCH).scores == [9.0, 12.0]


def test_statistics_worked_by_hand() -> None:
    scored = as_reward({"a": constant(1.0, 4.0), "b": constant(2.0, None)}).score(BATCH)
    found = scored.statistics()
    expected = {"a/mean": 2.5, "a/std": 1.5, "a/min": 1.0, "a/max": 4.0, "a/none": 0.0, "b/mean": 2.0, "b/std": 0.0}
    assert_close([found[f"reward/{key}"] for key in expected], list(expected.values()))
    assert found["reward/b/none"] == 0.5 and found["reward/excluded"] == 0.5 and found["reward/errors"] == 0.0
    empty = as_reward(hostile.length).score([]).statistics()
    assert math.isnan(empty["reward/length/mean"]) and empty["reward/errors"] == 0.0


@pytest.mark.parametrize(
    ("spec", "settings", "reason"),
    [
        (hostile.length, {"weights": [1.0]}, "applies to several rewards"),
        ([hostile.length], {"weights": [1.0, 2.0]}, "got 2 weights for 1 rewards"),
        ({"a": hostile.length}, {"weights": {"b": 1.0}}, "weights has the names 'b', but the rewards are 'a'"),
        ({"a": hostile.length}, {"weights": {"a": math.inf}}, "weight of 'a' is inf"),
        ({"a": hostile.length}, {"missing": "zero"}, "missing='zero'"),
        ([], {}, "rewards is empty"),
        ([hostile.length], {"name": "x"}, "applies to a single reward"),
        ([hostile.length], {"cache": "file"}, "would mix the scores"),
        (nn.Linear(1, 1), {}, "wrap it in ClassifierReward"),
        (3, {}, "is of type int"),
        (as_reward(hostile.length), {"on_error": "skip"}, "is already built"),
        (lambda: None, {}, r"has the signature \(\); expected f\(prompts, completions"),
        (lambda samples, other: [], {}, "takes arguments besides samples"),
        ("nowhere", {}, "expected 'module:function'"),
        (hostile.length, {"on_error": "ignore"}, "on_error='ignore'"),
        (hostile.length, {"on_error": "penalty"}, "if and only if on_error='penalty'"),
        (hostile.length, {"penalty": 1.0}, "if and only if on_error='penalty'"),
        (hostile.length, {"on_error": "penalty", "penalty": math.nan}, "penalty=nan"),
        (hostile.length, {"timeout": 1.0}, "needs isolation="),
        (hostile.length, {"timeout": 0.0, "isolation": "thread"}, "timeout=0.0"),
        (hostile.length, {"isolation": "fork"}, "isolation='fork'"),
        (hostile.length, {"concurrency": 0}, "concurrency=0"),
        (hostile.length, {"rows_per_call": 0}, "rows_per_call=0"),
    ],
)
def test_bad_settings(spec: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_reward(spec, **settings)


def test_rewards_are_closed_with_their_mix() -> None:
    class Part:
        closed = 0

        def score(self, samples: Any) -> Scored:
            raise AssertionError

        def close(self) -> None:
            self.closed += 1

    parts = {"a": Part(), "b": Part()}
    budgeted = as_reward(parts, budget=ErrorBudget())
    budgeted.close()
    CachedReward(parts["a"]).close()
    assert (parts["a"].closed, parts["b"].closed) == (2, 1)


# The cache.


class Counting:
    """Scores by length and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, prompts: Any, completions: list[str], answer: Any = None) -> list[Any]:
        self.asked.append(list(completions))
        return [
            None if text == "unscorable" else ValueError("ill") if text == "ill" else len(text) for text in completions
        ]


def test_cache_asks_once_and_answers_the_same() -> None:
    counting = Counting()
    reward = as_reward(counting, cache=True, on_error="skip")
    first = reward.score(samples("one", "four", "one", "unscorable", "ill", "ill"))
    assert counting.asked == [["one", "four", "unscorable", "ill"]]
    assert first.scores == [3.0, 4.0, 3.0, None, None, None]
    assert first.errors == [None] * 4 + ["ValueError: ill"] * 2
    assert [took > 0 for took in first.seconds] == [True, True, False, True, True, False]
    again = reward.score(samples("unscorable", "four", "ill", "new"))
    assert counting.asked[1:] == [["ill", "new"]]  # what failed is asked again, what is unscorable is not
    assert again.scores == [None, 4.0, None, 3.0]
    assert again.components == {"Counting": [None, 4.0, None, 3.0]}
    assert again.errors == [None, None, "ValueError: ill", None]
    reward.score([sample("four", prompt="other"), sample("four", answer=1)])
    assert counting.asked[2:] == [["four", "four"]]  # another prompt, another column


def test_cache_of_token_rewards_minds_their_number() -> None:
    reward = as_reward(hostile.per_token, cache=True)
    assert reward.score([sample("x", ids=(2,)), sample("x", ids=(4, 6))]).token_rewards == [[1.0], [2.0, 3.0]]
    assert reward.score([sample("x", ids=(8, 6)), sample("x", ids=(2,))]).token_rewards == [[4.0, 3.0], [1.0]]


def test_cache_on_disk_outlives_the_process_and_a_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "scores.jsonl"
    counting = Counting()
    as_reward(counting, cache=path).score(samples("one", "four"))
    with path.open("a") as file:
        file.write('["half an ent')
    reward = as_reward(counting, cache=str(path))
    assert "skipped 1 lines that are not score cache entries" in caplog.text
    assert reward.score(samples("four", "one", "three")).scores == [4.0, 3.0, 5.0]
    assert as_reward(counting, cache=path).score(samples("three")).scores == [5.0]
    assert counting.asked == [["one", "four"], ["three"]]


def test_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = ScoreCache(most=2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert (cache.get("a"), cache.get("b"), cache.get("c"), len(cache)) == (1, None, 3, 2)
    with pytest.raises(ValueError, match="most=0"):
        ScoreCache(most=0)


def test_cache_refuses_a_column_that_is_no_key() -> None:
    with pytest.raises(ColumnError, match="cannot be part of a cache key"):
        as_reward(Counting(), cache=True).score([sample("a", answer=object())])
    by_text = CachedReward(FunctionReward(Counting(), "c", Guard()), columns=())
    assert by_text.score([sample("a", answer=object())]).scores == [1.0]


# R9: the error budget.


def failing(shares: list[int]) -> Any:
    """Fails on the first n samples of each batch, for each n in turn."""
    calls = iter(shares)

    def reward(prompts: Any, completions: list[str]) -> list[Any]:
        bad = next(calls)
        return [common(i) if i < bad else 1.0 for i in range(len(completions))]

    return reward


def common(number: int) -> Exception:
    try:
        raise LookupError(f"no rubric for {number}")
    except LookupError as error:
        return error


def test_budget_stops_with_the_commonest_traceback() -> None:
    budget = ErrorBudget(share=0.25, window=8)  # two errors in eight samples are allowed
    reward = as_reward(failing([1, 1, 1]), on_error="skip", budget=budget)
    batch = samples(*"abcd")
    reward.score(batch)
    assert budget.errors == 1
    reward.score(batch)
    assert budget.errors == 2
    reward.score(batch)  # the window has moved on: the first is forgotten
    assert budget.errors == 2
    many = as_reward(failing([3]), on_error="penalty", penalty=0.0, budget=ErrorBudget(share=0.25, window=8))
    with pytest.raises(
        RewardErrors, match=r"3 of the last 3 samples; .* share=0.25 of window=8.* 3 times: LookupError"
    ) as caught:
        many.score(batch)
    assert "in common\n" in str(caught.value) and "no rubric for 0" in str(caught.value)


def test_budget_names_the_commonest_of_several() -> None:
    def two(prompts: Any, completions: list[str]) -> list[Any]:
        return ["text", common(1), common(2), "text", common(3)]

    with pytest.raises(RewardErrors, match="Most common error, 3 times: LookupError"):
        as_reward(two, on_error="skip", budget=ErrorBudget(0.8, 5)).score(samples(*"abcde"))


def test_budget_of_zero_and_none_is_no_error() -> None:
    strict = ErrorBudget(share=0.0)
    as_reward(constant(None, 1.0), budget=strict).score(BATCH)
    with pytest.raises(RewardErrors):
        as_reward(constant(math.nan, 1.0), on_error="skip", budget=strict).score(BATCH)


def test_budget_goes_on_from_a_checkpoint() -> None:
    reward_of = lambda budget, bad: as_reward(failing([bad]), on_error="skip", budget=budget)  # noqa: E731
    first = ErrorBudget(share=0.5, window=4)
    reward_of(first, 2).score(samples(*"ab"))
    second = ErrorBudget(share=0.5, window=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.raises(RewardErrors, match="3 of the last 3"):
        reward_of(second, 1).score(samples("a"))
    for settings in ({"share": 1.0}, {"share": -0.1}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ErrorBudget(**settings)


def test_mix_keeps_tracebacks_for_the_budget() -> None:
    mix = RewardMix({"a": as_reward(failing([1]), on_error="skip"), "b": as_reward(hostile.length)})
    scored = mix.score(samples("one"))
    assert scored.tracebacks[0].startswith("a: Traceback") and "in common" in scored.tracebacks[0]


# Numbers that float32 cannot hold ------------------------------------------------------------------------------------

HUGE = 1e39
TOO_LARGE = [
    (lambda: HUGE, "the score is 1e+39; expected a number that float32 can hold"),
    (lambda: -HUGE, "the score is -1e+39"),
    (lambda: np.float64(HUGE), "the score is 1e+39"),
    (lambda: torch.tensor(HUGE, dtype=torch.double), "the score is 1e+39"),
    (lambda: 10**40, "the score is 1e+40"),
    (lambda: [HUGE, 0.0], "the reward of token 0 is 1e+39"),
    (lambda: [3e38, 3e38], "the rewards of 2 tokens add up to more than float32 can hold"),
    (lambda: [3e38, -3e38], "the rewards of 2 tokens add up"),  # a return is a part of the sum
]


@pytest.mark.parametrize(("value", "said"), TOO_LARGE)
def test_a_score_above_float32_is_a_failure_of_its_sample(value: Any, said: str) -> None:
    function = lambda prompts, completions: [value(), 2.0]  # noqa: E731
    skipped = as_reward(function, on_error="skip").score(BATCH)
    assert skipped.scores == [None, 2.0] and skipped.token_rewards == [None, None]
    assert said in skipped.errors[0] and skipped.errors[1] is None
    assert as_reward(function, on_error="penalty", penalty=-1.0).score(BATCH).scores == [-1.0, 2.0]
    with pytest.raises(RewardFailed, match="failed on the completion 'one two': ValueError: the reward"):
        as_reward(lambda prompts, completions: [[HUGE, 0.0], 2.0]).score(BATCH)


def test_the_largest_float32_is_a_score() -> None:
    largest = float(np.finfo(np.float32).max)
    assert as_reward(constant(largest, -largest)).score(BATCH).scores == [largest, -largest]


@pytest.mark.parametrize("penalty", [HUGE, -HUGE, math.inf, math.nan])
def test_a_penalty_is_a_number_that_float32_can_hold(penalty: float) -> None:
    with pytest.raises(ValueError, match=r"penalty=.*must be a finite number that float32 can hold"):
        Guard(on_error="penalty", penalty=penalty)


@pytest.mark.parametrize(
    ("first", "weight"), [(1e30, 1e30), (1e30, 1e300), (1e38, 10.0), ([1e30, 0.0], 1e20), ([3e38, 0.0], 1.5)]
)
def test_a_weighted_sum_above_float32_is_a_failure_of_its_sample(first: Any, weight: float) -> None:
    made = {"first": constant(first, 1.0), "second": constant(1.0, 0.5)}
    weights = {"first": weight, "second": -1.0}
    skipped = as_reward(made, weights=weights, on_error="skip").score(BATCH)
    assert skipped.scores == [None, weight - 0.5] if weight < 1e38 else [None, None]
    assert "ValueError: the weighted sum" in skipped.errors[0] and skipped.token_rewards == [None, None]
    assert skipped.components["second"] == [1.0, 0.5]
    assert as_reward(made, weights=weights, on_error="penalty", penalty=-3.0).score(BATCH).scores[0] == -3.0
    with pytest.raises(RewardFailed, match=r"the weighted sum .* x first, -1 x second overflows float32"):
        as_reward(made, weights=weights).score(BATCH)


def answer(**changed: Any) -> Any:
    class Made:
        def score(self, samples: Any) -> Scored:
            count = len(samples)
            fields = {"scores": [1.0] * count, "token_rewards": [None] * count, "errors": [None] * count}
            return Scored(**({**fields, "components": {}, "seconds": [0.0] * count} | changed))

        def close(self) -> None:
            pass

    return Made()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scores": [1.0, math.nan]}, "Made returned the score nan for sample 1"),
        ({"scores": [HUGE, 1.0]}, "Made returned the score 1e\\+39 for sample 0"),
        ({"scores": [1.0]}, "Made returned 1 scores for 2 samples"),
        ({"token_rewards": [[0.0, math.inf], None]}, "for sample 0, with 2 token_rewards"),
        ({"token_rewards": [[0.0], None]}, "Made returned 1 token_rewards for the 2 tokens of sample 0"),
    ],
)
def test_what_a_reward_of_ones_own_says_is_checked(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RewardFailed, match=said):
        as_reward({"made": answer(**changed), "other": hostile.length}).score(BATCH)


def test_a_cache_of_an_earlier_version_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    as_reward(hostile.length, cache=path).score(BATCH)
    path.write_text(path.read_text().replace("7.0", "1e39"))
    with pytest.raises(RewardFailed, match="CachedReward returned the score 1e\\+39 for sample 0"):
        as_reward(as_reward(hostile.length, cache=path), budget=ErrorBudget()).score(BATCH)


# Messages ------------------------------------------------------------------------------------------------------------


def _divide(completions: list[str]) -> list[float]:
    return [1 / 0 for _ in completions]


@pytest.mark.parametrize("isolation", ["none", "thread", "process"])
def test_a_failure_shows_the_users_frames_alone(isolation: Any) -> None:
    reward = as_reward(_divide, isolation=isolation)
    with pytest.raises(RewardFailed) as raised:
        reward.score(BATCH)
    reward.close()
    text = str(raised.value)
    assert "in _divide" in text and "return [1 / 0" in text and text.endswith("ZeroDivisionError: division by zero")
    assert "isolation.py" not in text and "signature.py" not in text and "worker.py" not in text


@pytest.mark.parametrize(
    ("answer", "said"),
    [(1.0, "the reward returned 1.0 of type float"), (["good", "bad"], "the score is 'good' of type str")],
)
def test_an_answer_that_is_no_score_is_told_in_one_line(answer: Any, said: str) -> None:
    with pytest.raises(RewardFailed) as raised:
        as_reward(lambda completions: answer).score(BATCH)
    assert str(raised.value).count(said) == 1 and "\n" not in str(raised.value)
