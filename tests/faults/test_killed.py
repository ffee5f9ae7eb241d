"""Killed anywhere, a run that is gone on with ends with the bits of the run that was left alone."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Server, differences, kill_points, survive
from tests.faults.job import BATCH, PROMPTS, STEPS
from tests.faults.orders import FULL, LORA, SEQ2SEQ, Undisturbed, at

ISOLATED = {"case": "lora", "guard": {"isolation": "process", "timeout": 30.0}}
POINTS = 50


@pytest.mark.parametrize(
    ("job", "orders"),
    [
        (FULL, [at("sampling", 14)]),
        (FULL, [at("save/write", 9, "half"), at("save/fsync", 4)]),
        (FULL, [at("after step", 10)]),
        (LORA, [at("evaluation", 13), at("before backward", 7)]),
        (LORA, [at("model", 2)]),
        (LORA, [at("append/write", 4, "half"), at("record/write", 3, "half"), at("append/write", 2, "half")]),
        (SEQ2SEQ, [at("scoring", 15)]),
        (ISOLATED, [at("scoring", 4)]),
    ],
    ids=lambda value: "-".join(o["kind"] for o in value) if isinstance(value, list) else value["case"],
)
def test_a_killed_run_ends_as_the_one_left_alone(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, job: dict[str, Any], orders: list[dict[str, Any]]
) -> None:
    survival = survive(server, tmp_path, job, undisturbed(job), orders)
    assert survival.kills == len(orders)
    assert not survival.differences


def test_two_runs_of_one_seed_are_the_same(server: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    wanted = undisturbed(FULL)
    ended = server.run(tmp_path, FULL)
    assert not differences(ended.report, wanted)
    other = server.run(tmp_path / "other", {**FULL, "settings": {"seed": 5}})
    assert differences(other.report, wanted)  # what is compared does tell runs apart


def test_a_run_that_has_ended_stays_as_it_is(server: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    for _ in range(2):
        ended = server.run(tmp_path, FULL)
        assert ended.status == 0, ended.log[-3000:]
        assert not differences(ended.report, undisturbed(FULL))


def consumed(report: dict[str, Any]) -> list[str]:
    return [sample["prompt_id"] for some in report["samples"] for sample in some]


def test_every_prompt_is_taken_once_an_epoch(undisturbed: Undisturbed) -> None:
    taken = consumed(undisturbed(FULL))
    assert len(taken) == STEPS * BATCH
    for start in range(0, len(taken), len(PROMPTS)):
        epoch = Counter(taken[start : start + len(PROMPTS)])
        assert max(epoch.values()) == 1
    assert len(set(taken)) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_is_gone_on_with_at_any_step_of_an_epoch(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, step: int
) -> None:
    """Ten prompts in batches of four: steps 1 and 6 begin an epoch or its second half, step 3 spans two epochs."""
    job = {**FULL, "save_every": 1}
    # Each step scores four samples: this one is killed in its first, and what it sampled is sampled again.
    survival = survive(server, tmp_path, job, undisturbed(job), [at("scoring", BATCH * (step - 1) + 1)])
    assert not survival.differences


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "job", "ranks"),
    [
        ("full fine-tuning", FULL, 1),
        ("LoRA", LORA, 1),
        ("seq2seq", SEQ2SEQ, 1),
        ("rewards in a process", ISOLATED, 1),
        ("two gloo processes", FULL, 2),
    ],
)
def test_fifty_kills(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, figures: list[str], name: str, job: dict[str, Any], ranks: int
) -> None:  # fmt: skip
    wanted = undisturbed(job, ranks)
    chance = random.Random(f"{name} {ranks}")
    survivals = []
    for i, first in enumerate(kill_points(wanted["counts"], POINTS, seed=len(name))):
        orders = [
            {**first, "rank": chance.randrange(ranks)}
            if not first["kind"].startswith(("save", "record", "append"))
            else first
        ]
        if i % 5 == 4:  # and what goes on with it is killed, too, in its first step
            orders.append(at(chance.choice(["sampling", "scoring", "after backward", "before step"]), 2))
        survivals.append(survive(server, tmp_path / str(i), job, wanted, orders, ranks))
    equal = sum(not survival.differences for survival in survivals)
    kills = sum(survival.kills for survival in survivals)
    figures.append(f"{name}: {equal} of {POINTS} bit-equal, after {kills} kills")
    failed = [(s.orders, s.differences[:5]) for s in survivals if s.differences]
    assert not failed
