"""R16: a dead, slow or full tracker changes no weight and costs a step next to nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl.trackers import NullTracker, SafeTracker


class Listening:
    """Keeps its rows; `before` runs at every one of them."""

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.rows: list[tuple[Mapping[str, Any], int]] = []
        self.closed = 0
        self.threads: set[int] = set()
        self._before = before

    def log(self, row: Mapping[str, Any], step: int) -> None:
        self.threads.add(threading.get_ident())
        self._before()
        self.rows.append((row, step))

    def close(self) -> None:
        self.closed += 1


def raising(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_rows_arrive_in_order_on_another_thread_and_as_they_were() -> None:
    tracker = Listening()
    with SafeTracker(tracker) as safe:
        row: dict[str, Any] = {"a": 0}
        for step in range(50):
            row["a"] = step
            safe.log(row, step)
    assert tracker.rows == [({"a": step}, step) for step in range(50)]
    assert tracker.threads and threading.get_ident() not in tracker.threads
    assert (safe.dropped, safe.failures, tracker.closed) == (0, 0, 1)
    safe.close()
    assert tracker.closed == 1


def test_s9_secrets_stay_here_and_everything_else_arrives() -> None:
    tracker = Listening()
    array = np.zeros(3)
    with SafeTracker(tracker) as safe:
        safe.log({"token": "abc", "url": "http://a:b@c", "array": array, "reward/password": 3}, 1)
    ((row, _),) = tracker.rows
    assert row["token"] == "[redacted]" and row["url"] == "http://[redacted]@c"
    assert row["array"] is array and row["reward/password"] == 3


@pytest.mark.parametrize("error", [ConnectionError("gone"), SystemExit(1)])
def test_dead_tracker_is_logged_once_and_counted(caplog: pytest.LogCaptureFixture, error: BaseException) -> None:
    with caplog.at_level(logging.WARNING), SafeTracker(Listening(raising(error)), name="wall") as safe:
        for step in range(5):
            safe.log({"a": 1}, step)
    assert (safe.failures, safe.dropped) == (5, 0)
    assert [r.getMessage().splitlines()[0] for r in caplog.records] == [
        "tracker wall failed (log of step 0); further failures are only counted"
    ]
    assert type(error).__name__ in caplog.text


def test_failure_of_close_is_counted() -> None:
    class Unclosable(Listening):
        def close(self) -> None:
            raise OSError("full")

    with SafeTracker(Unclosable()) as safe:
        pass
    assert safe.failures == 1


def test_hanging_tracker_fills_the_queue_and_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    free = threading.Event()
    tracker = Listening(lambda: free.wait(30) and None)
    with caplog.at_level(logging.WARNING):
        safe = SafeTracker(tracker, capacity=4, close_timeout=0.05)
        safe.log({}, 0)
        while not tracker.threads:  # the thread holds row 0 now
            time.sleep(0.001)
        started = time.perf_counter()
        for step in range(1, 101):
            safe.log({}, step)
        assert time.perf_counter() - started < 1.0
        assert safe.dropped == 96
        safe.close()
        assert time.perf_counter() - started < 2.0
    assert safe.dropped == 100
    assert len(caplog.records) == 2
    assert "is behind by 4 rows: dropping rows, starting at step 5" in caplog.messages[0]
    assert "did not finish within 0.05 s: dropping 4 rows" in caplog.messages[1]
    free.set()
    safe._thread.join(5)
    assert [step for _, step in tracker.rows] == [0] and tracker.closed == 1


def test_rows_after_close_are_dropped() -> None:
    safe = SafeTracker(tracker := Listening())
    safe.close()
    safe.log({}, 1)
    assert (safe.dropped, tracker.rows) == (1, [])


def test_bad_settings() -> None:
    for settings, reason in (({"capacity": 0}, "capacity=0"), ({"close_timeout": -1}, "close_timeout=-1")):
        with pytest.raises(ValueError, match=reason):
            SafeTracker(NullTracker(), **settings)


def weights_after_training(tracker: Any) -> tuple[dict[str, torch.Tensor], float]:
    """Weights after three steps that log to `tracker`, and the seconds that logging took."""
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-2)
    trainer = PPOTrainer(config, model, create_reference_model(model), tiny_tokenizer())
    queries = [torch.tensor([5, 6, 7])] * 4
    seconds = 0.0
    for step in range(3):
        responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=6)
        stats = trainer.step(queries, list(responses), [torch.tensor(float(len(set(r.tolist())))) for r in responses])
        started = time.perf_counter()
        tracker.log(stats, step)
        seconds += time.perf_counter() - started
    return {name: weight.clone() for name, weight in model.state_dict().items()}, seconds


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return weights_after_training(NullTracker())[0]


@pytest.mark.parametrize("kind", ["dead", "slow", "full", "hanging"])
def test_r16_no_tracker_changes_a_weight_or_holds_up_a_step(kind: str, expected: dict[str, torch.Tensor]) -> None:
    free = threading.Event()
    before: dict[str, Callable[[], None]] = {
        "dead": raising(ConnectionError("gone")),
        "slow": lambda: time.sleep(2),
        "full": raising(OSError(28, "No space left on device")),
        "hanging": lambda: free.wait(30) and None,
    }
    safe = SafeTracker(Listening(before[kind]), capacity=1, close_timeout=0.05)
    found, seconds = weights_after_training(safe)
    safe.close()
    free.set()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert seconds < 0.2  # of three steps; the slow tracker alone would take 6
    assert safe.failures + safe.dropped > 0
