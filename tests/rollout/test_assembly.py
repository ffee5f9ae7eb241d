"""Rollouts built by hand, and split into queries and responses again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl.rollout.assembly import assemble, rollout_rows
from trl.types import Rollout

PAD = 9


def rows(*lists: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(one) for one in lists]


def test_a_rollout_worked_by_hand() -> None:
    rollout = assemble(
        rows([5, 6, 7], [8]), rows([1, 2], [3]), pad_token=PAD, side="right",
        logprobs=[torch.tensor([-0.1, -0.2]), torch.tensor([-0.3])], values=[torch.tensor([1.0, 2.0]), torch.tensor([3.0])],
        policy_version=2,
    )  # fmt: skip
    assert rollout.tokens.tolist() == [[5, 6, 7, 1, 2], [8, 3, PAD, PAD, PAD]]
    assert rollout.attention.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert rollout.mask.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert rollout.sampler_logprobs is not None and rollout.values is not None
    assert torch.equal(rollout.sampler_logprobs, torch.tensor([[0, 0, -0.1, -0.2], [-0.3, 0, 0, 0]]))
    assert torch.equal(rollout.values, torch.tensor([[0.0, 0, 1, 2], [3, 0, 0, 0]]))
    assert rollout.policy_version == 2 and rollout.group.tolist() == [0, 1]


def test_padding_on_the_left_moves_every_column() -> None:
    rollout = assemble(rows([5, 6], [8]), rows([1, 2], [3]), pad_token=PAD, side="left")
    assert rollout.tokens.tolist() == [[5, 6, 1, 2], [PAD, PAD, 8, 3]]
    assert rollout.attention.tolist() == [[True] * 4, [False, False, True, True]]
    assert rollout.mask.tolist() == [[False, True, True], [False, False, True]]


def test_an_encoder_reads_the_queries() -> None:
    rollout = assemble(rows([0], [0]), rows([1, 2], [3]), encoded=rows([5, 6, 7], [8]), pad_token=PAD, side="right")
    assert rollout.tokens.tolist() == [[0, 1, 2], [0, 3, PAD]]
    assert rollout.mask.tolist() == [[True, True], [True, False]]
    assert rollout.encoder_tokens is not None and rollout.encoder_attention is not None
    assert rollout.encoder_tokens.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert rollout.encoder_attention.tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_token", [PAD, 3, 8])  # padding is known by the attention, not by its token
def test_rows_of_a_decoder(side: Any, pad_token: int) -> None:
    queries, responses = rows([5, 8, 8], [8], [3, 3]), rows([3], [3, 8, 3, 3], [1, 2])
    got = rollout_rows(assemble(queries, responses, pad_token=pad_token, side=side))
    assert [t.tolist() for t in got[0]] == [[5, 8, 8], [8], [3, 3]]
    assert [t.tolist() for t in got[1]] == [[3], [3, 8, 3, 3], [1, 2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_an_encoder_decoder_begin_with_the_start_token(side: Any) -> None:
    rollout = assemble(rows([0], [0]), rows([1], [3, 0]), encoded=rows([5, 6], [8]), pad_token=0, side=side)
    queries, responses = rollout_rows(rollout)
    assert [t.tolist() for t in queries] == [[5, 6], [8]]
    assert [t.tolist() for t in responses] == [[0, 1], [0, 3, 0]]


def test_rows_are_copies() -> None:
    """Written into, or saved alone, they have nothing to do with the rollout."""
    tokens, ones = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    queries, responses = rollout_rows(Rollout(tokens=tokens, attention=ones, mask=torch.tensor([[False, True]])))
    for row in (*queries, *responses):
        row.fill_(0)
        assert row.untyped_storage().nbytes() == row.numel() * 8
    assert tokens.tolist() == [[5, 6, 7]]
