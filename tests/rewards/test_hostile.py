"""R8: whatever a reward function does, `on_error` does what it says and nothing is scored 0 in silence."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rewards import hostile
from tests.rewards.samples import samples
from trl.rewards import RewardFailed, as_reward
from trl.rewards.failures import Failure
from trl.rewards.isolation import call_within

BOTH = [True, True]
FIRST = [True, False]
# The function, which of its two samples fail, and what the error says.
ORDINARY: list[tuple[Callable[..., Any], list[bool], str]] = [
    (hostile.raises, BOTH, "KeyError: 'no such thing'"),
    (hostile.not_a_number, FIRST, "ValueError: the score is nan; expected a finite number"),
    (hostile.none, BOTH, "TypeError: the reward returned None; expected a list of 2 numbers"),
    (hostile.wrong_length, BOTH, "ValueError: the reward returned 1 values for 2 samples"),
    (hostile.wrong_type, FIRST, "TypeError: the score is 'good' of type str; expected a number"),
    (hostile.a_generator, BOTH, "TypeError: the reward returned an object of type generator; expected a list of"),
    (hostile.exits, BOTH, "RuntimeError: the reward called sys.exit(3)"),
]
# What only a process of its own survives.
DEADLY: list[tuple[Callable[..., Any], str]] = [
    (hostile.exits_hard, "the reward's process exited with status 3"),
    (hostile.crashes, "the reward's process was killed by SIGSEGV"),
]
SLOW = [hostile.sleeps, hostile.hangs_in_c, hostile.switches_its_watchdog_off, hostile.closes_everything]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


@pytest.fixture
def closing() -> Iterator[Callable[..., Any]]:
    """`as_reward`, closed after the test."""
    made = []

    def make(*args: Any, **settings: Any) -> Any:
        made.append(as_reward(*args, **settings))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("isolation", ["none", "thread", "process"])
@pytest.mark.parametrize(("function", "failed", "said"), ORDINARY, ids=lambda case: getattr(case, "__name__", ""))
def test_r8_on_error(
    closing: Any, caplog: pytest.LogCaptureFixture, function: Any, failed: list[bool], said: str, isolation: str
) -> None:
    batch = samples("one", "two")
    skipping = closing(function, on_error="skip", isolation=isolation)
    with caplog.at_level(logging.WARNING):
        scored = skipping.score(batch)
    assert scored.scores == [None if bad else 1.0 for bad in failed]
    assert [error is not None for error in scored.errors] == failed
    assert [error is not None for error in scored.tracebacks] == failed
    assert scored.errors[0].startswith(said)
    assert said in caplog.text and f"failed on {sum(failed)} of 2 samples" in caplog.text
    assert scored.statistics()["reward/errors"] == scored.statistics()["reward/excluded"] == sum(failed) / 2
    if isolation == "process":
        return  # the same code decides about the rest; a process each is not needed
    penalised = closing(function, on_error="penalty", penalty=-3.0, isolation=isolation).score(batch)
    assert penalised.scores == [-3.0 if bad else 1.0 for bad in failed]
    assert penalised.components == {function.__name__: penalised.scores}
    assert penalised.errors == scored.errors
    with pytest.raises(RewardFailed, match=f"reward '{function.__name__}' failed on the completion 'one'"):
        closing(function, isolation=isolation).score(batch)


@pytest.mark.parametrize(("function", "said"), DEADLY, ids=lambda case: getattr(case, "__name__", ""))
def test_r8_death_of_the_process(closing: Any, function: Any, said: str) -> None:
    reward = closing(function, on_error="skip", isolation="process", timeout=20)
    for _ in range(2):  # it is started again, and dies again
        scored = reward.score(samples("one", "two"))
        assert scored.scores == [None, None]
        assert scored.errors == [said, said]
    if function is hostile.exits_hard:
        assert "end of its output:\nabout to leave" in scored.tracebacks[0]
    else:
        assert "Fatal Python error" in scored.tracebacks[0] and "in crashes" in scored.tracebacks[0]


@pytest.mark.parametrize("function", SLOW)
def test_r8_a_hang_is_gone_within_a_second_of_its_timeout(closing: Any, function: Any) -> None:
    reward = closing(function, on_error="penalty", penalty=-1.0, isolation="process", timeout=0.5)
    assert reward.reads_ids is False  # starts the process: its start has a timeout of its own
    pid = reward._runners[0]._worker.process.pid
    started = time.monotonic()
    scored = call_within(30, lambda: reward.score(samples("one", "two")))  # else a lost timeout hangs the suite
    assert time.monotonic() - started < 1.5
    assert not alive(pid)
    assert scored.scores == [-1.0, -1.0]
    if function is not hostile.closes_everything:  # that one dies at once, its pipes being gone
        assert scored.errors == ["TimeoutError: the call took longer than its timeout of 0.5 s"] * 2
        told = f"in {function.__name__}" in scored.tracebacks[0]  # where it hung
        assert told == (function is not hostile.switches_its_watchdog_off)
    assert all(error is not None for error in scored.errors)


def test_r8_children_are_gone_with_it(closing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILDREN_FILE", str(tmp_path / "pids"))
    reward = closing(hostile.leaves_children, on_error="skip", isolation="process", timeout=1)
    assert call_within(30, lambda: reward.score(samples("one"))).scores == [None]
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(children) == 3
    assert [pid for pid in children if alive(pid)] == []


def test_nothing_outlives_close(closing: Any) -> None:
    reward = closing(hostile.forks_and_both_return, isolation="process")
    reward.score(samples("one"))
    pid = reward._runners[0]._worker.process.pid
    assert alive(pid)
    reward.close()
    assert not alive(pid)
    assert reward.score(samples("four")).scores == [4.0]  # and starts again


def test_r8_a_fork_answers_once(closing: Any) -> None:
    reward = closing(hostile.forks_and_both_return, isolation="process", timeout=20)
    for text in ("a", "bb", "ccc"):
        assert reward.score(samples(text)).scores == [float(len(text))]


def test_r8_a_fork_in_this_process_does_not_go_on() -> None:
    """Without a guard there would be two trainers: two lines."""
    script = (
        "from tests.rewards import hostile\nfrom tests.rewards.samples import samples\nfrom trl.rewards import as_reward\n"
        "print(as_reward(hostile.forks_and_both_return).score(samples('one')).scores, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[3.0]\n", done.stderr


def test_r8_printing_without_end_neither_blocks_nor_fills_memory(closing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRINTED_MEGABYTES", "64")
    reward = closing(hostile.prints, isolation="process", timeout=30)
    assert reward.score(samples("one", "four")).scores == [3.0, 4.0]
    assert len(reward._runners[0]._worker.process._tail) <= 16_384


@pytest.mark.slow
def test_r8_a_gigabyte(closing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRINTED_MEGABYTES", "1024")
    assert closing(hostile.prints, isolation="process", timeout=120).score(samples("one")).scores == [3.0]


def test_one_row_per_call_loses_one_row(closing: Any) -> None:
    def picky(prompts: list[str], completions: list[str]) -> list[float]:
        return [1.0 / (len(text) - 3) for text in completions]

    scored = closing(picky, on_error="skip", rows_per_call=1).score(samples("one", "four", "two", "three"))
    assert scored.scores == [None, 1.0, None, 0.5]
    together = closing(picky, on_error="skip").score(samples("one", "four", "two", "three"))
    assert together.scores == [None] * 4


def test_a_dead_process_is_started_again(closing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXITED_FILE", str(tmp_path / "exited"))
    reward = closing(hostile.exits_once, on_error="skip", isolation="process")
    assert reward.score(samples("one")).scores == [None]
    assert reward.score(samples("one")).scores == [3.0]


def test_a_thread_is_given_up_and_not_for_ever(closing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()

    def stuck(prompts: list[str], completions: list[str]) -> list[float]:
        release.wait(60)
        return [1.0] * len(completions)

    reward = closing(stuck, on_error="skip", isolation="thread", timeout=0.01)
    started = time.monotonic()
    for _ in range(16):
        assert reward.score(samples("one")).errors == ["TimeoutError: the call took longer than its timeout of 0.01 s"]
    with pytest.raises(RewardFailed, match="16 timed-out calls of reward 'stuck' are still running"):
        reward.score(samples("one"))
    assert time.monotonic() - started < 5
    release.set()


def test_a_trainer_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """Not even one that hangs in C and holds the interpreter's lock."""
    script = (
        "from tests.rewards import hostile\nfrom tests.rewards.samples import samples\nfrom trl.rewards import as_reward\n"
        "reward = as_reward(hostile.hangs_in_c, isolation='process', timeout=0.5)\nreward.reads_ids\n"
        "print(reward._runners[0]._worker.process.pid, flush=True)\nreward.score(samples('one'))\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.rewards.broken_module:f", "this module is broken"),
        ("tests.rewards.hostile:missing", "has no attribute 'missing'"),
        ("tests.rewards.hostile:unreadable", "is of type int; expected a function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
    ],
)
def test_a_process_that_cannot_start_says_so_whatever_on_error_is(closing: Any, path: str, reason: str) -> None:
    with pytest.raises(RewardFailed, match=reason):
        closing(path, on_error="skip", isolation="process").score(samples("one"))


def test_control_characters_do_not_reach_the_terminal() -> None:
    failure = Failure.of(ValueError("\x1b]0;title\x07red\x1b[31m\nnext‮line" + "x" * 1000))
    assert failure.line.isprintable() and len(failure.line) == 300


def test_an_interrupt_is_no_failure(closing: Any) -> None:
    def interrupted(prompts: list[str], completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    for settings in ({}, {"isolation": "thread"}, {"concurrency": 2}):
        with pytest.raises(KeyboardInterrupt):
            closing(interrupted, on_error="skip", **settings).score(samples("one", "two"))
