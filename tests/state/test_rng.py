"""Generators are restored to the bit, whatever was drawn in between."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from trl.state.rng import generators_state, preserved_generators, seeded_generators, set_generators

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def undisturbed_suite() -> Any:
    """Leaves the suite's own generators as they were, by means of their own libraries."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def drawn(order: torch.Generator) -> list[float]:
    """A number of every generator; `gauss` and `normal` keep half a pair back, which is part of their state."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.normal()),
        float(torch.rand(())),
        float(torch.rand((), generator=order)),
    ]


def test_a_state_survives_json_and_brings_back_the_same_numbers() -> None:
    order = torch.Generator().manual_seed(5)
    drawn(order)  # so that half a pair is held back
    state = json.loads(json.dumps(generators_state(CPU, order)))
    first = drawn(order)
    assert drawn(order) != first
    set_generators(state, CPU, order)
    assert drawn(order) == first
    assert state["cuda"] == []


def test_the_minibatch_order_is_its_own_generator() -> None:
    order = torch.Generator().manual_seed(5)
    state = generators_state(CPU, order)
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(5)).tolist()
    assert torch.randperm(10, generator=order).tolist() == expected
    set_generators(state, CPU, order)
    torch.rand(7)  # of the global generator
    assert torch.randperm(10, generator=order).tolist() == expected


def test_generators_are_kept_even_if_the_block_raises() -> None:
    order = torch.Generator().manual_seed(5)
    state = generators_state(CPU, order)
    first = drawn(order)
    set_generators(state, CPU, order)

    def draw_and_fail() -> None:
        drawn(order)
        torch.manual_seed(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), preserved_generators(CPU, order):
        draw_and_fail()
    assert drawn(order) == first


def test_numbers_inside_depend_on_the_seed_alone_and_those_after_on_nothing_inside() -> None:
    order = torch.Generator().manual_seed(5)
    state = generators_state(CPU, order)
    after = drawn(order)
    set_generators(state, CPU, order)
    large = 2**32 + 7  # NumPy takes 32 bits
    random.seed(large)
    np.random.seed(7)
    torch.manual_seed(large)
    expected = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    set_generators(state, CPU, order)
    with seeded_generators(large, CPU, order):
        assert [random.random(), float(np.random.rand()), float(torch.rand(()))] == expected
    assert drawn(order) == after


def test_a_state_that_lacks_a_generator_is_refused() -> None:
    order = torch.Generator()
    state = generators_state(CPU, order)
    del state["numpy"]
    with pytest.raises(KeyError, match="numpy"):
        set_generators(state, CPU, order)
