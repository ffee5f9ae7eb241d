"""SIGTERM and SIGINT end a run at a step, with a checkpoint and the exit code that the documentation names."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Server, differences
from tests.faults.job import BATCH
from tests.faults.orders import FULL, LORA, SEQ2SEQ, Undisturbed, at, checkpoints

TERMINATED, INTERRUPTED = 143, -signal.SIGINT  # the second is 130 in a shell

# Four samples, microbatches and optimizer steps in each of the six steps; evaluations before the first and after steps 2, 4 and 6.
DURING_STEP_3 = [("sampling", 10), ("scoring", 2 * BATCH + 2), ("before backward", 10), ("after step", 11)]
MORE = [("after backward", 9), ("before step", 12), ("scoring", 2 * BATCH + 1), ("sampling", 12)]


def stopped(server: Server, folder: Path, job: dict[str, Any], name: str, place: tuple[str, int]) -> int:
    """Sends the signal; returns the step of the checkpoint that it left."""
    ended = server.run(folder, {**job, "save_every": 100, "orders": [at(*place, name)]})
    assert ended.status == (TERMINATED if name == "SIGTERM" else INTERRUPTED), ended.log[-3000:]
    assert not ended.report
    assert len(checkpoints(folder)) == 1
    return int(checkpoints(folder)[0].removeprefix("step-"))


def goes_on(server: Server, folder: Path, job: dict[str, Any], wanted: dict[str, Any]) -> None:
    ended = server.run(folder, {**job, "save_every": 100})
    assert ended.status == 0, ended.log[-3000:]
    assert not differences(ended.report, wanted)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("SIGTERM", DURING_STEP_3[0]),
        ("SIGINT", DURING_STEP_3[2]),
        *(
            pytest.param(name, place, marks=pytest.mark.slow)
            for name, places in (
                ("SIGTERM", DURING_STEP_3[1:] + MORE),
                ("SIGINT", [*DURING_STEP_3[:2], DURING_STEP_3[3]]),
            )
            for place in places
        ),
    ],
    ids=str,
)
def test_a_signal_ends_the_step_and_saves(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, name: str, place: tuple[str, int]
) -> None:
    assert stopped(server, tmp_path, FULL, name, place) == 3
    goes_on(server, tmp_path, FULL, undisturbed({**FULL, "save_every": 100}))


@pytest.mark.parametrize(
    "case",
    [FULL, *(pytest.param(job, marks=pytest.mark.slow) for job in (LORA, SEQ2SEQ))],
    ids=lambda job: job["case"],
)
def test_a_signal_during_an_evaluation(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, case: dict[str, Any]
) -> None:
    wanted = undisturbed({**case, "save_every": 100})
    middle = 5 * wanted["counts"]["evaluation"] // 8  # of four evaluations, the third of which follows step 4
    assert stopped(server, tmp_path, case, "SIGTERM", ("evaluation", middle)) == 4
    goes_on(server, tmp_path, case, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("place", DURING_STEP_3 + MORE, ids=str)
@pytest.mark.parametrize("case", [LORA, SEQ2SEQ], ids=lambda job: job["case"])
def test_a_signal_at_more_places(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, case: dict[str, Any], place: tuple[str, int]
) -> None:
    wanted = undisturbed({**case, "save_every": 100})
    step = stopped(server, tmp_path, case, "SIGTERM", place)
    assert step == 3 or (place[0] == "sampling" and step in (2, 3, 4))  # how long responses are depends on the model
    goes_on(server, tmp_path, case, wanted)


def test_a_second_interrupt_ends_the_run_at_once(server: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    orders = [
        at("scoring", 2 * BATCH + 1, "SIGINT"),
        at("scoring", 2 * BATCH + 2, "SIGINT"),
        at("scoring", 12, "SIGKILL"),
    ]
    ended = server.run(tmp_path, {**FULL, "orders": orders})
    assert ended.status == INTERRUPTED, ended.log[-3000:]  # and was not there any more to be killed
    assert checkpoints(tmp_path) == ["step-00000002"]
    ended = server.run(tmp_path, FULL)
    assert not differences(ended.report, undisturbed(FULL))


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_at_the_same_step(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, figures: list[str]
) -> None:
    wanted = undisturbed({**FULL, "save_every": 100}, 2)
    for place in DURING_STEP_3:
        folder = tmp_path / place[0].replace(" ", "-")
        job = {**FULL, "save_every": 100}
        ended = server.run(folder, {**job, "orders": [at(*place, "SIGTERM", rank=1)]}, ranks=2)
        assert ended.statuses == [TERMINATED, TERMINATED], ended.log[-3000:]
        assert checkpoints(folder) == ["step-00000003"]
        ended = server.run(folder, job, ranks=2)
        assert not differences(ended.report, wanted)
