"""Decoding given responses gives the log-probabilities that they were sampled with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from trl.rollout import LocalEngine, replayed_logprobs, rollout_rows
from trl.types import Sampling


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama, tiny_t5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_saw(make: Callable[[], Any], temperature: float) -> None:
    model = make()
    queries = [torch.arange(5, 5 + n) for n in (2, 7, 3, 3)]
    sampling = Sampling(temperature=temperature, stops=(1,), limits=(3, 6, 6, 1), seed=5)
    rollout = LocalEngine(model).generate(queries, sampling)
    assert rollout.sampler_logprobs is not None
    _, responses = rollout_rows(rollout)
    sampled = [response[1:] for response in responses] if make is tiny_t5 else responses
    replayed = replayed_logprobs(model, queries, sampled, temperature=temperature)
    assert [len(row) for row in replayed] == [len(row) for row in sampled]
    assert_close(torch.cat(replayed), rollout.sampler_logprobs[rollout.mask])
