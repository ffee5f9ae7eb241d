"""How a function is called, from its signature alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.rewards import hostile
from tests.rewards.samples import sample
from trl.rewards.failures import ColumnError
from trl.rewards.signature import Binding, call, copy_samples, path_of, resolve, with_every_column

BATCH = [sample("a b", prompt="p", answer=1), sample("c", prompt="q", answer=2, level="x")]


def two_positional(texts: Any, answers: Any) -> Any: ...
def column(prompts: Any, completions: Any, answer: Any, level: Any = None) -> Any: ...
def keywords(*, completions: Any, completion_ids: Any) -> Any: ...
def everything(prompts: Any, completions: Any, **columns: Any) -> Any: ...
def whole_samples(samples: Any, *rest: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "positional", "named"),
    [
        (two_positional, [["p", "q"], ["a b", "c"]], {}),
        (column, [], {"prompts": ["p", "q"], "completions": ["a b", "c"], "answer": [1, 2], "level": [None, "x"]}),
        (keywords, [], {"completions": ["a b", "c"], "completion_ids": [[1, 2], [1]]}),
        (everything, [], {"prompts": ["p", "q"], "completions": ["a b", "c"], "answer": [1, 2], "level": [None, "x"]}),
        (whole_samples, [BATCH], {}),
    ],
)
def test_arguments_of_a_call(function: Any, positional: list[Any], named: dict[str, Any]) -> None:
    binding = Binding.of(function, function.__name__)
    assert Binding.from_json(binding.to_json()) == binding
    assert binding.arguments(BATCH, binding.columns_to_pass(BATCH, "f")) == (positional, named)


def test_a_column_without_a_default_is_required() -> None:
    binding = Binding.of(column, "column")
    assert binding.required == ("answer",) and binding.columns == ("answer", "level")
    with pytest.raises(ColumnError, match="reward 'f' needs the column 'answer'; the prompts have no columns besides"):
        binding.columns_to_pass([sample("a")], "f")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda prompts: [], r"has the signature \(prompts\)"),
        (lambda prompts, /, completions: [], "'prompts' as positional-only"),
        (lambda samples, other: [], "arguments besides samples"),
        (
            type("NoSignature", (), {"__signature__": 3, "__call__": print})(),
            "signature of reward 'f' cannot be inspected",
        ),
    ],
)
def test_signatures_that_fit_no_reward(function: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Binding.of(function, "f")


def test_columns_are_copied_deeply_and_shared_values_once() -> None:
    shared = [1]
    first, second = copy_samples([sample("a", x=shared, y=0), sample("b", x=shared, y=0)], ["x"])
    assert first.columns == {"x": [1]} and first.columns["x"] is second.columns["x"] is not shared
    (whole,) = copy_samples([sample("a", x=shared, y=0)])
    assert whole.columns == {"x": [1], "y": 0}


def test_missing_columns_are_filled_with_none() -> None:
    assert [one.columns for one in with_every_column(BATCH)] == [
        {"answer": 1, "level": None},
        {"answer": 2, "level": "x"},
    ]


def test_a_coroutine_is_awaited_inside_and_outside_a_loop() -> None:
    async def doubled(x: int) -> int:
        await asyncio.sleep(0)
        if x < 0:
            raise KeyError(x)
        return 2 * x

    async def inside() -> int:
        return call(doubled, [3], {})

    assert call(doubled, [], {"x": 3}) == asyncio.run(inside()) == 6
    assert call(abs, [-3], {}) == 3
    with pytest.raises(KeyError):
        call(doubled, [-1], {})


def test_a_path_leads_back_to_its_function() -> None:
    assert path_of(hostile.length) == "tests.rewards.hostile:length"
    assert resolve("tests.rewards.hostile:length") is hostile.length
    assert resolve("os:path.join") is __import__("os").path.join


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("os", "expected 'module:function'"),
        ("os:", "expected 'module:function'"),
        (":join", "expected 'module:function'"),
        ("os:path.gone", "the module os has no attribute 'path.gone'"),
        ("os:name", "is of type str; expected a function"),
    ],
)
def test_paths_to_nothing(path: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve(path)
