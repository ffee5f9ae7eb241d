"""Threads under rewards: order, first errors, timeouts, and functions that leave."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest

from tests.rewards.samples import sample, samples
from trl.rewards.isolation import Inline, Threaded, call_within, drawing_from, guarded, in_threads, random_stream


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_results_keep_the_order_of_the_items(threads: int) -> None:
    assert in_threads(lambda i: i * i, range(7), threads) == [0, 1, 4, 9, 16, 25, 36]
    assert in_threads(lambda i: i, [], threads) == []


def test_the_first_failed_item_is_the_one_that_raises() -> None:
    late = threading.Event()

    def fails(i: int) -> int:
        if i == 1:
            late.wait(10)  # fails after item 2 has
            raise KeyError(i)
        if i == 2:
            late.set()
            raise ValueError(i)
        return i

    with pytest.raises(KeyError):
        in_threads(fails, range(4), 4)


def test_no_more_items_run_at_once_than_there_are_threads() -> None:
    running, highest, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2, timeout=10)

    def watched(i: int) -> None:
        nonlocal running, highest
        with lock:
            running += 1
            highest = max(highest, running)
        both.wait()
        with lock:
            running -= 1

    in_threads(watched, range(6), 2)
    assert highest == 2


def test_threads_see_the_callers_context() -> None:
    inside: ContextVar[str] = ContextVar("inside", default="outside")
    token = inside.set("set")
    assert in_threads(lambda i: inside.get(), range(2), 2) == ["set", "set"]
    inside.reset(token)


def test_call_within_returns_raises_or_gives_up() -> None:
    assert call_within(10, lambda: 3) == call_within(None, lambda: 3) == 3
    with pytest.raises(KeyError, match="gone"):
        call_within(10, lambda: {}["gone"])
    release, abandoned = threading.Event(), []
    with pytest.raises(TimeoutError, match=r"longer than its timeout of 0\.01 s"):
        call_within(0.01, lambda: release.wait(30), abandoned)
    (thread,) = abandoned
    assert thread.is_alive() and thread.daemon
    release.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_reward_does_not_end_the_process() -> None:
    def leaves() -> None:
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match=r"the reward called sys\.exit\(3\)"):
        guarded(leaves, (), {})


def test_the_random_stream_is_named_inside_the_context_only() -> None:
    with drawing_from("0/7"):
        assert random_stream.get() == "0/7"
    with pytest.raises(ZeroDivisionError), drawing_from("0/8"):
        raise ZeroDivisionError
    assert random_stream.get() == ""


@pytest.mark.parametrize("runner", [Inline, lambda function, name: Threaded(function, name, timeout=30)])
def test_runners_pass_copies_of_the_columns(runner: object) -> None:
    def spoils(prompts: list[str], completions: list[str], answer: list[list[int]]) -> list[float]:
        return [float(len(numbers) + bool(numbers.clear())) for numbers in answer]

    batch = [sample("a", answer=[1, 2]), sample("b", answer=[3])]
    assert runner(spoils, "spoils").run(batch) == [2.0, 1.0]  # type: ignore[operator]
    assert [one.columns["answer"] for one in batch] == [[1, 2], [3]]


def test_a_runner_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="returned 1 values for 2 samples"):
        Inline(lambda prompts, completions: [1.0], "short").run(samples("a", "b"))
