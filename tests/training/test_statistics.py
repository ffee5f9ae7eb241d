"""Statistics of a step over several processes, against numbers worked out from the samples themselves."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.functional.oracles import Ranks
from tests.helpers import assert_close, poison
from trl.training.statistics import pooled_mean, step_statistics
from trl.types import Tally

# Response lengths and counted tokens differ from rank to rank; one sample of the second rank is left out.
MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
SCORES = torch.tensor([1.0, 3.0, 100.0, -2.0, 5.0, 0.5])
SPLITS = [[6], [2, 4], [1, 2, 3], [3, 3]]


def whole() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    arrays = [poison(-torch.rand(MASK.shape, generator=random), MASK) for _ in range(3)]
    names = ("logprobs", "ref_logprobs", "non_score_reward")
    lengths = [[torch.zeros(n) for n in numbers] for numbers in ((3, 1, 4, 1, 5, 9), (1, 2, 4, 4, 3, 3))]
    return dict(zip(names, arrays)) | {
        "scores": SCORES, "mask": MASK, "queries": lengths[0], "responses": lengths[1],
    }  # fmt: skip


TRAIN_STATS = {"val/error": torch.tensor([1.0, 3.0]), "returns/var": torch.tensor([4.0, 4.0])}


@pytest.mark.conformance
@pytest.mark.parametrize("split", SPLITS)
def test_49_numbers_are_those_of_all_samples_however_they_are_split(split: list[int]) -> None:
    batch, starts = whole(), [sum(split[:i]) for i in range(len(split))]

    def rank(i: int, reduce: Any) -> dict[str, Any]:
        rows = slice(starts[i], starts[i] + split[i])
        part = {name: values[rows] for name, values in batch.items()}
        return step_statistics(kl_coef=0.2, train_stats=TRAIN_STATS, reduce=reduce, **part)

    logprobs, ref, penalty = (batch[name] for name in ("logprobs", "ref_logprobs", "non_score_reward"))
    counted = [i for i in range(6) if bool(MASK[i].any())]
    scores = [float(SCORES[i]) for i in counted]
    expected = {
        "objective/kl": math.fsum((logprobs - ref)[MASK].tolist()) / len(counted),
        "objective/entropy": -math.fsum(logprobs[MASK].tolist()) / len(counted),
        "ppo/mean_non_score_reward": statistics.mean(penalty[MASK].tolist()),
        "ppo/mean_scores": statistics.mean(scores),
        "ppo/std_scores": statistics.stdev(scores),
        "tokens/queries_len_mean": 23 / 6,
        "tokens/queries_len_std": statistics.stdev([3.0, 1.0, 4.0, 1.0, 5.0, 9.0]),
        "tokens/responses_len_mean": 17 / 6,
        "tokens/responses_len_std": statistics.stdev([1.0, 2.0, 4.0, 4.0, 3.0, 3.0]),
        "ppo/val/var_explained": 1 - 2 / 4,
    }
    for stats in Ranks(len(split)).run(rank):
        for name, value in expected.items():
            assert_close(stats[name], value)


def test_a_single_sample_has_no_spread() -> None:
    one = {name: values[:1] for name, values in whole().items()}
    stats = step_statistics(kl_coef=0.2, train_stats=TRAIN_STATS, **one)
    assert stats["ppo/std_scores"] == stats["tokens/queries_len_std"] == 0


def test_a_negative_kl_is_that_of_all_processes() -> None:
    """One process alone below -1 is noise; the sum over both decides, on both."""

    def rank(i: int, reduce: Any) -> Tensor:
        logprobs = torch.full((2, 2), -2.0 if i == 0 else 2.0)
        return step_statistics(
            kl_coef=0.2, scores=torch.zeros(2), logprobs=logprobs, ref_logprobs=torch.zeros(2, 2),
            non_score_reward=torch.zeros(2, 2), mask=torch.ones(2, 2).bool(), queries=[torch.zeros(1)] * 2,
            responses=[torch.zeros(2)] * 2, train_stats=TRAIN_STATS, reduce=reduce,
        )["objective/kl"]  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Ranks(2).run(rank) == [0.0, 0.0]


def test_a_pooled_mean_over_nothing_is_0() -> None:
    assert pooled_mean(Tally(torch.tensor(0.0), torch.tensor(0))) == 0
    assert pooled_mean(Tally(torch.tensor(3.0), torch.tensor(2))) == 1.5
