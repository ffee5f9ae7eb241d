from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.helpers import assert_close
from trl.types import ActorCritic, Loss, Rollout, Tally, identity, mean_and_std, occupied, take, widen


def rollout(**changes: torch.Tensor | None) -> Rollout:
    """Three sequences of six columns; column 0 and column 5 are padding in all of them."""
    attention = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]).bool()
    fields = dict(tokens=torch.arange(18).view(3, 6), attention=attention, mask=attention[:, 1:] & attention[:, :-1])
    return Rollout(**(fields | changes))  # type: ignore[arg-type]


def experience() -> ActorCritic:
    arrays = {name: torch.arange(15.0).view(3, 5) + 100 * i for i, name in enumerate(
        ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns", "non_score_reward"), start=1
    )}  # fmt: skip
    return ActorCritic(rollout=rollout(), scores=torch.tensor([1.0, 2.0, 3.0]), **arrays)


# --- tallies ------------------------------------------------------------------------------------------------------


def test_tally_worked_by_hand() -> None:
    values, mask = (
        torch.tensor([[1.0, 2.0], [4.0, float("nan")]]),
        torch.tensor([[True, False], [True, False]]),
    )
    tally = Tally.of(values, mask)
    assert (float(tally.sum), int(tally.count), float(tally.mean())) == (5.0, 2, 2.5)


def test_tallies_add_up_and_divide_once() -> None:
    """A mean of means would say (1 + 4) / 2; four numbers of which three are 4 have the mean 3.25."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    total = Tally.of(torch.tensor([[1.0]]), mask[:, :1]) + Tally.of(torch.tensor([[4.0, 4.0, 4.0]]), mask)
    assert_close(total.mean(), 3.25)


def test_an_empty_tally_has_the_mean_zero() -> None:
    nothing = Tally.of(torch.tensor([[float("nan")]]), torch.tensor([[False]]))
    assert float(nothing.mean()) == 0.0


def test_a_detached_tally_has_no_graph() -> None:
    leaf = torch.ones(1, 2, requires_grad=True)
    tally = Tally.of(leaf, torch.ones(1, 2, dtype=torch.bool))
    assert tally.sum.requires_grad and not tally.detach().sum.requires_grad
    assert float(tally.detach().mean()) == 1.0


# --- batches ------------------------------------------------------------------------------------------------------


def test_nothing_can_be_changed_in_place_or_forgotten() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        rollout().tokens = torch.zeros(1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="returns"):
        ActorCritic(rollout=rollout(), scores=torch.zeros(3))  # type: ignore[call-arg]


def test_lengths() -> None:
    assert len(rollout()) == len(experience()) == 3


def test_take_rows() -> None:
    picked = take(experience(), torch.tensor([2, 0]))
    assert picked.scores.tolist() == [3.0, 1.0]
    assert picked.rollout.tokens[:, 0].tolist() == [12, 0]
    assert picked.old_logprobs[:, 0].tolist() == [110.0, 100.0]
    assert picked.returns[:, 4].tolist() == [614.0, 604.0]


def test_take_columns_in_token_coordinates() -> None:
    """Column s of a per-token array concerns token s + 1: tokens 1, 2, 3 keep the predictions of tokens 2 and 3."""
    cut = take(experience(), slice(0, 2), slice(1, 4))
    assert cut.rollout.tokens.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert cut.rollout.attention.shape == (2, 3)
    assert cut.rollout.mask.tolist() == [[True, True], [True, True]]
    assert cut.old_logprobs.tolist() == [[101.0, 102.0], [106.0, 107.0]]
    assert cut.scores.tolist() == [1.0, 2.0]


def test_take_rows_leaves_the_columns_and_the_version_alone() -> None:
    encoder = torch.arange(21).view(3, 7)
    whole = rollout(
        encoder_tokens=encoder, encoder_attention=encoder > 6, sampler_logprobs=torch.arange(15.0).view(3, 5)
    )
    part = take(dataclasses.replace(whole, policy_version=4), slice(1, 3))
    assert part.encoder_tokens is not None and part.encoder_tokens.tolist() == encoder[1:].tolist()
    assert part.tokens.shape == (2, 6) and part.mask.shape == (2, 5)
    assert part.policy_version == 4


def test_take_columns_cuts_the_padding_of_the_encoder_by_its_own_mask() -> None:
    encoder = torch.arange(12).view(3, 4)
    seen = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    whole = rollout(encoder_tokens=encoder, encoder_attention=seen, sampler_logprobs=torch.arange(15.0).view(3, 5))
    cut = take(whole, slice(1, 3), slice(2, 5))
    assert cut.encoder_tokens is not None and cut.encoder_tokens.tolist() == [[5, 6], [9, 10]]
    assert cut.encoder_attention is not None and cut.encoder_attention.tolist() == [
        [True, True],
        [False, True],
    ]
    assert cut.sampler_logprobs is not None and cut.sampler_logprobs.tolist() == [[7.0, 8.0], [12.0, 13.0]]


def test_occupied() -> None:
    assert occupied(rollout().attention) == slice(1, 5)
    assert occupied(torch.ones(2, 3, dtype=torch.bool)) == slice(0, 3)
    assert occupied(torch.zeros(2, 3, dtype=torch.bool)) == slice(0, 3)


def test_widen_puts_trimmed_columns_back() -> None:
    array = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert widen(array, slice(2, 5), 5).tolist() == [[0.0, 0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0, 0.0]]
    assert widen(array[..., None], slice(0, 3), 3).tolist() == [[[1.0], [2.0], [0.0]], [[3.0], [4.0], [0.0]]]


def test_mean_and_std_are_of_the_population() -> None:
    assert mean_and_std([1.0, 5.0]) == (3.0, 2.0)
    assert all(math.isnan(number) for number in mean_and_std([]))


def test_identity_is_the_sum_over_one_process() -> None:
    x = torch.tensor([1.0])
    assert identity(x) is x


def test_losses_do_not_share_their_arrays() -> None:
    one, other = (Loss(objective=torch.zeros(()), metrics={}) for _ in range(2))
    assert one.arrays == {} and one.arrays is not other.arrays
