"""`Process`, the runner in a worker process: values by hand, and answers that no honest worker gives."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.rewards import hostile
from tests.rewards.samples import sample, samples
from trl.rewards.failures import ColumnError, Failure, RewardFailed, RowFailed
from trl.rewards.isolated import Process

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process(hostile.length, "length", timeout=30, start_timeout=60)
    yield process
    process.close()


def test_rows_come_back_in_order_and_the_worker_is_reused(process: Process) -> None:
    assert process.path == "tests.rewards.hostile:length"
    assert process.run(samples("one", "four", "")) == [3.0, 4.0, 0.0]
    worker = process._worker
    assert process.run(samples("seven")) == [5.0] and process._worker is worker
    assert process.binding.named == ("prompts", "completions") and not process.binding.reads_ids


def test_columns_and_token_ids_travel() -> None:
    process = Process("tests.rewards.hostile:of_samples", "of_samples", timeout=30, start_timeout=60)
    try:
        assert process.run([sample("a b c", answer=10), sample("a", answer=20)]) == [13.0, 21.0]
        with pytest.raises(ColumnError, match=r"'of_samples' \(answer\) cannot be sent to its worker process as JSON"):
            process.run([sample("a", answer=object())])
        assert process.run([sample("a", answer=1)]) == [2.0]  # nothing was sent: the worker is still in step
    finally:
        process.close()


@pytest.mark.parametrize("answer", [b"[1.0]", b"{", b"3", b"[" * 100_000])
def test_an_answer_that_is_not_one_is_a_failure(process: Process, answer: bytes) -> None:
    process.run(samples("one"))
    worker = process._worker
    assert worker is not None
    inward, outward = os.pipe()
    os.dup2(inward, worker.answers)  # whatever the worker says, this is what is read
    os.set_blocking(worker.answers, False)
    os.write(outward, answer[:60_000] + b"\n")
    with pytest.raises(RowFailed, match="the reward's process sent an invalid answer"):
        process.run(samples("one"))
    os.close(inward)
    os.close(outward)
    assert process._worker is None
    assert process.run(samples("four")) == [4.0]  # by a new worker


def test_a_function_that_raises_fails_its_rows_and_keeps_the_worker() -> None:
    process = Process(hostile.raises, "raises", timeout=30, start_timeout=60)
    try:
        for _ in range(2):
            with pytest.raises(RowFailed) as caught:
                process.run(samples("one"))
            assert isinstance(caught.value.failure, Failure)
            assert (
                caught.value.failure.line == "KeyError: 'no such thing'"
                and "in raises" in caught.value.failure.traceback
            )
            assert process._worker is not None
    finally:
        process.close()


def test_a_module_that_cannot_be_imported_is_no_failure_of_a_row() -> None:
    with pytest.raises(RewardFailed, match=r"reward 'r' \(no_such_module:f\) cannot be imported"):
        Process("no_such_module:f", "r", timeout=1, start_timeout=60).run(samples("one"))
