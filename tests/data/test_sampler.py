from __future__ import annotations

import json
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl.data import PromptSampler


def batches(sampler: PromptSampler, steps: int) -> list[list[int]]:
    return [sampler.next() for _ in range(steps)]


def flat(lists: list[list[int]]) -> list[int]:
    return [index for indices in lists for index in indices]


# sorted(range(8), key=keys) of the raw PCG64 stream of SeedSequence(3, spawn_key=(epoch,)), sorted in plain Python.
ORDER_OF_SEED_3 = [[4, 6, 1, 5], [7, 0, 3, 2], [0, 6, 7, 5], [2, 1, 4, 3]]


def test_order_is_the_same_for_ever() -> None:
    """Written down: another order would break every run that is resumed with a newer version of NumPy or trl."""
    assert batches(PromptSampler(8, batch_size=4, seed=3), 4) == ORDER_OF_SEED_3


def test_unshuffled_worked_by_hand() -> None:
    carry = PromptSampler(5, batch_size=3, seed=0, shuffle=False)
    assert batches(carry, 4) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert carry.dropped == 0
    drop = PromptSampler(5, batch_size=3, seed=0, shuffle=False, remainder="drop")
    assert batches(drop, 3) == [[0, 1, 2]] * 3
    assert drop.dropped == 6


def test_every_prompt_once_per_epoch_and_every_epoch_in_its_own_order() -> None:
    drawn = flat(batches(PromptSampler(30, batch_size=7, seed=1), 30))  # 210 = 7 epochs
    epochs = [tuple(drawn[start : start + 30]) for start in range(0, 210, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(epochs)) == 7


def test_each_seed_has_its_order() -> None:
    orders = {tuple(PromptSampler(20, batch_size=20, seed=seed).next()) for seed in range(50)}
    assert len(orders) == 50


def test_no_global_generator_is_read_or_moved() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = batches(PromptSampler(9, batch_size=4, seed=0), 5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(99)
    np.random.seed(99)
    assert batches(PromptSampler(9, batch_size=4, seed=0), 5) == first


def test_fewer_prompts_than_a_batch() -> None:
    sampler = PromptSampler(3, batch_size=7, seed=0)
    drawn = flat(batches(sampler, 3))  # 21 = 7 epochs
    assert [sorted(drawn[i : i + 3]) for i in range(0, 21, 3)] == [[0, 1, 2]] * 7
    assert (sampler.epoch, sampler.position) == (7, 0)


def test_it_is_an_iterator() -> None:
    sampler = PromptSampler(5, batch_size=2, seed=0)
    assert list(islice(sampler, 3)) == batches(PromptSampler(5, batch_size=2, seed=0), 3)


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 23),
    share=st.integers(1, 4),
    world=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 2**40),
    drop=st.booleans(),
    shuffle=st.booleans(),
)
def test_ranks_share_the_batch_of_one_process(
    size: int, share: int, world: int, seed: int, drop: bool, shuffle: bool
) -> None:
    """R12: whatever divides by what, every rank gets `share` prompts, and together those that one process would."""
    plan: dict[str, Any] = dict(batch_size=share * world, seed=seed, shuffle=shuffle)
    plan["remainder"] = "drop" if drop and size >= share * world else "carry"
    alone = PromptSampler(size, **plan)
    ranks = [PromptSampler(size, **plan, rank=rank, world=world) for rank in range(world)]
    for _ in range(9):
        parts = [rank.next() for rank in ranks]
        assert [len(part) for part in parts] == [share] * world
        assert flat(parts) == alone.next()
        assert all(rank.state_dict() == alone.state_dict() and rank.dropped == alone.dropped for rank in ranks)


@pytest.mark.parametrize("remainder", ["carry", "drop"])
@pytest.mark.parametrize("size", [3, 12, 14])
def test_resume_at_every_step(size: int, remainder: Any) -> None:
    """R6: at the start, the middle, the end and the last step of an epoch, and in a batch that spans two epochs."""
    if remainder == "drop" and size < 4:
        size = 5
    plan: dict[str, Any] = dict(batch_size=4, seed=7, remainder=remainder)
    whole = batches(PromptSampler(size, **plan), 12)
    for stop in range(12):
        first = PromptSampler(size, **plan)
        assert batches(first, stop) == whole[:stop]
        state = json.loads(json.dumps(first.state_dict()))
        second = PromptSampler(size, **plan)
        second.load_state_dict(state)
        assert batches(second, 12 - stop) == whole[stop:]
        assert second.dropped == PromptSampler(size, **plan)._skipped_per_epoch * second.epoch


def test_resume_with_another_number_of_processes() -> None:
    whole = batches(PromptSampler(10, batch_size=4, seed=0), 6)
    first = PromptSampler(10, batch_size=4, seed=0, rank=1, world=2)
    batches(first, 3)
    parts = []
    for rank in range(4):
        sampler = PromptSampler(10, batch_size=4, seed=0, rank=rank, world=4)
        sampler.load_state_dict(first.state_dict())
        parts.append(batches(sampler, 3))
    assert [flat(list(step)) for step in zip(*parts)] == whole[3:]


def test_another_plan_is_refused_and_every_difference_named() -> None:
    state = PromptSampler(10, batch_size=4, seed=0).state_dict()
    other = PromptSampler(12, batch_size=6, seed=1, shuffle=False, remainder="drop")
    with pytest.raises(
        ValueError, match="size was 10 and is 12 now; batch_size was 4 and is 6 now; seed was 0 and is 1"
    ):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle was True and is False now; remainder was 'carry' and is 'drop'"):
        other.load_state_dict(state)
    assert (other.epoch, other.position) == (0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position": 10}, "position=10; expected an integer from 0 to 9"),
        ({"position": -1}, "position=-1"),
        ({"epoch": 1.0}, "epoch=1.0"),
        ({"epoch": True}, "epoch=True"),
        ({"version": 9}, "version 9"),
        ({"more": 1}, "more"),
    ],
)
def test_broken_state(change: dict[str, Any], reason: str) -> None:
    sampler = PromptSampler(10, batch_size=4, seed=0)
    with pytest.raises(ValueError, match=reason):
        sampler.load_state_dict(sampler.state_dict() | change)


def test_broken_state_of_whole_batches() -> None:
    sampler = PromptSampler(10, batch_size=4, seed=0, remainder="drop")
    with pytest.raises(ValueError, match="position=3, which is not a multiple of batch_size=4"):
        sampler.load_state_dict(sampler.state_dict() | {"position": 3})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 0}, "size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"rank": 2, "world": 2}, "rank=2 must be below world=2"),
        ({"world": 3}, "batch_size=4 over all processes is not a multiple of world=3"),
        ({"remainder": "pad"}, "remainder='pad' must be one of carry, drop"),
        ({"size": 3, "remainder": "drop"}, "3 prompts are fewer than batch_size=4"),
    ],
)
def test_bad_arguments(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PromptSampler(**({"size": 10, "batch_size": 4, "seed": 0} | change))


def test_dropping_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    PromptSampler(8, batch_size=4, seed=0, remainder="drop")
    PromptSampler(10, batch_size=4, seed=0)
    assert caplog.text == ""
    PromptSampler(10, batch_size=4, seed=0, remainder="drop")
    assert "skipping 2 of 10 prompts in every epoch" in caplog.text
