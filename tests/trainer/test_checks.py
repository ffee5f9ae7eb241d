"""Each check of `PPOTrainer.step`'s arguments, without a trainer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from trl.trainer.checks import (
    check_lists,
    check_logprobs,
    check_per_token,
    check_room,
    check_scores,
    check_start,
    check_tokens,
)

IDS = torch.tensor([5, 6])


def test_lists_of_tensors_pass() -> None:
    check_lists(2, queries=[IDS, IDS], scores=[torch.tensor(1.0)] * 2)
    check_lists(None, queries=[])


@pytest.mark.parametrize(
    ("size", "values", "reason"),
    [
        (None, (IDS,), "queries must be a list of tensors, not tuple"),
        (None, IDS, "queries must be a list of tensors, not Tensor"),
        (3, [IDS, IDS], "queries has 2 elements; expected batch_size=3"),
        (2, [IDS, [5, 6]], r"queries\[1\] must be a tensor, not list"),
    ],
)
def test_lists_that_are_refused(size: int | None, values: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_lists(size, queries=values)


def test_token_ids_up_to_the_vocabulary_pass() -> None:
    check_tokens("q", [IDS, IDS.to(torch.int32)], vocabulary=7)
    check_tokens("q", [torch.tensor([10**6])], vocabulary=None)


@pytest.mark.parametrize(
    ("tokens", "settings", "reason"),
    [
        (IDS[None], {}, r"q\[0\] must be a 1-D tensor of token ids, not of shape \(1, 2\)"),
        (IDS.float(), {}, r"q\[0\] must hold token ids \(int64\), not torch\.float32"),
        (IDS > 5, {}, r"not torch\.bool"),
        (IDS[:0], {}, r"q\[0\] is empty; expected at least 1\. Leave such samples out"),
        (IDS[:1], {"least": 2}, r"q\[0\] has 1 token; expected at least 2 \(the decoder's start token"),
        (torch.tensor([7, 5]), {}, r"q\[0\] contains token id 7; expected ids from 0 to 6"),
        (torch.tensor([5, -1]), {}, r"q\[0\] contains token id -1; expected ids from 0 to 6"),
        (torch.tensor([-1]), {"vocabulary": None}, r"q\[0\] contains token id -1; expected ids of at least 0"),
    ],
)
def test_tokens_that_are_refused(tokens: Any, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_tokens("q", [tokens], **{"vocabulary": 7, **settings})


def test_the_context_may_be_filled_and_not_exceeded() -> None:
    check_room([3, 8], 8, "the query")
    check_room([10**6], None, "the query")
    with pytest.raises(ValueError, match="the query of sample 1 is 9 tokens long; the model's context length is 8"):
        check_room([3, 9], 8, "the query")


def test_scores_become_0d_float32() -> None:
    flat = check_scores([torch.tensor(1), torch.tensor([0.5], dtype=torch.float64), torch.tensor([True])])
    assert [(score.item(), score.dim(), score.dtype) for score in flat] == [
        (1.0, 0, torch.float32),
        (0.5, 0, torch.float32),
        (1.0, 0, torch.float32),
    ]


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (torch.tensor([1.0, 2.0]), r"scores\[0\] must be one number \(0-D or 1-D\), not of shape \(2,\)"),
        (torch.tensor([[1.0]]), r"not of shape \(1, 1\)"),
        (torch.tensor(1j), r"scores must be real numbers"),
        (torch.tensor(math.nan), r"scores\[0\] is nan"),
        (
            torch.tensor(1e39, dtype=torch.float64),
            r"scores\[0\] is 1e\+39: scores must be numbers that are finite in float32",
        ),
    ],
)
def test_scores_that_are_refused(score: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_scores([score])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (torch.zeros(3), r"r\[0\] has shape \(3,\); its response has \(2,\)"),
        (torch.zeros(2, dtype=torch.complex64), r"r\[0\] has dtype torch\.complex64; expected real numbers"),
        (torch.tensor([0.0, math.inf]), r"r\[0\] contains a number that is not finite in float32"),
    ],
)
def test_numbers_per_token_that_are_refused(values: Any, reason: str) -> None:
    check_per_token("r", [torch.tensor([1, 2])], [IDS])
    with pytest.raises(ValueError, match=reason):
        check_per_token("r", [values], [IDS])


def test_logprobs_are_at_most_0_up_to_rounding() -> None:
    check_logprobs([torch.tensor([-3.0, 0.0009])])
    with pytest.raises(ValueError, match=r"sampler_logprobs\[1\] contains 0\.002; log-probabilities must be at most 0"):
        check_logprobs([torch.zeros(1), torch.tensor([-1.0, 0.002])])


def test_a_response_without_the_start_token_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_start([IDS, IDS], 5)
        check_start([IDS], None)
    with pytest.warns(UserWarning, match=r"1 of 2 responses do not begin with the decoder's start token 5 .* with 6\."):
        check_start([IDS, IDS.flip(0)], 5)
