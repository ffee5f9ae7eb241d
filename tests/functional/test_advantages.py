from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.functional import oracles
from tests.functional.oracles import POISONS, f64, masked_arrays, masks, ragged_mask, randn
from tests.helpers import assert_close, poison
from trl.functional import gae, last_true, shape_rewards

YES, NO = True, False


# --- rewards ------------------------------------------------------------------------------------------------------


def test_last_true() -> None:
    mask = torch.tensor([[YES, YES, NO], [NO, YES, YES], [YES, NO, NO], [NO, NO, NO], [YES, NO, YES]])
    assert last_true(mask).tolist() == [1, 2, 0, -1, 2]
    assert last_true(torch.zeros(0, 3, dtype=torch.bool)).tolist() == []


def test_last_true_of_rows_without_columns() -> None:
    assert last_true(torch.zeros(2, 0, dtype=torch.bool)).tolist() == [-1, -1]


def test_rewards_worked_by_hand() -> None:
    kl = f64([[0.1, 0.2, 0.3], [1.0, -1.0, 5.0]])
    mask = torch.tensor([[YES, YES, YES], [YES, YES, NO]])
    rewards, penalty = shape_rewards(f64([1.0, -2.0]), kl, mask, kl_coef=0.5)
    assert_close(penalty, [[-0.05, -0.1, -0.15], [-0.5, 0.5, 0.0]])
    assert_close(rewards, [[-0.05, -0.1, 0.85], [-0.5, -1.5, 0.0]])


def test_token_rewards_add_to_the_score_and_the_penalty() -> None:
    mask = torch.tensor([[YES, YES, NO]])
    extra = f64([[0.25, 0.5, 9.0]])
    rewards, penalty = shape_rewards(f64([1.0]), f64([[1.0, 2.0, 9.0]]), mask, kl_coef=0.1, token_rewards=extra)
    assert_close(rewards, [[0.15, 1.3, 0.0]])
    assert_close(penalty, [[-0.1, -0.2, 0.0]])


def test_the_score_of_a_row_without_tokens_goes_nowhere() -> None:
    mask = torch.tensor([[NO, NO], [YES, NO]])
    rewards, _ = shape_rewards(f64([float("nan"), 1.0]), torch.zeros(2, 2), mask, kl_coef=0.2)
    assert_close(rewards, [[0.0, 0.0], [1.0, 0.0]])


@given(masked_arrays(arrays=2), st.floats(0.0, 2.0))
def test_rewards_of_a_row_add_up(drawn: tuple[torch.Tensor, ...], kl_coef: float) -> None:
    mask, kl, extra = drawn
    scores = randn(len(mask), seed=9)
    rewards, penalty = shape_rewards(scores, kl, mask, kl_coef=kl_coef, token_rewards=extra)
    for b, row in enumerate(mask.tolist()):
        columns = [s for s, bit in enumerate(row) if bit]
        expected = sum(float(extra[b, s]) - kl_coef * float(kl[b, s]) for s in columns)
        expected += float(scores[b]) if columns else 0.0
        assert_close(rewards[b].sum(), f64(expected), tol=1e-12)
        for s in set(range(len(row))) - set(columns[-1:]):
            alone = float(extra[b, s]) - kl_coef * float(kl[b, s]) if row[s] else 0.0
            assert_close(rewards[b, s], f64(alone), tol=1e-12)
    assert float(penalty.masked_fill(mask, 0).abs().sum()) == 0.0


@pytest.mark.parametrize("filling", POISONS)
def test_rewards_do_not_read_off_the_mask(filling: float) -> None:
    kl, extra, mask = randn(4, 5, seed=1), randn(4, 5, seed=2), ragged_mask([5, 0, 2, 3], 5)
    clean = shape_rewards(randn(4), kl, mask, kl_coef=0.3, token_rewards=extra)
    dirty = shape_rewards(
        randn(4), poison(kl, mask, filling), mask, kl_coef=0.3, token_rewards=poison(extra, mask, filling)
    )
    for one, other in zip(clean, dirty):
        assert torch.equal(one, other)


def test_whole_numbers_do_not_round_the_rewards() -> None:
    ones = torch.ones(1, 2, dtype=torch.int64)
    rewards, penalty = shape_rewards(
        torch.tensor([0.3]), ones, ones.bool(), kl_coef=0.25, token_rewards=torch.tensor([[1, 2]])
    )
    assert_close(rewards, [[0.75, 2.05]])
    assert_close(penalty, [[-0.25, -0.25]])


def test_rewards_carry_no_gradient() -> None:
    scores, kl, extra = (x.requires_grad_() for x in (randn(2), randn(2, 3), randn(2, 3, seed=1)))
    rewards, penalty = shape_rewards(scores, kl, torch.ones(2, 3, dtype=torch.bool), kl_coef=0.2, token_rewards=extra)
    assert not rewards.requires_grad and not penalty.requires_grad


# --- advantages ---------------------------------------------------------------------------------------------------


def test_gae_worked_by_hand() -> None:
    """γ = λ = 1/2. TD errors 1 + 1 - 1 = 1, 0 + 1.5 - 2 = -1/2, 4 - 3 = 1; each adds a quarter of what follows."""
    rewards, values = f64([[1.0, 0.0, 4.0]]), f64([[1.0, 2.0, 3.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.5)
    assert_close(advantages, [[1 - 0.25 / 4, -0.25, 1.0]])
    assert_close(returns, [[2 - 0.25 / 4, 1.75, 4.0]])


def test_gae_with_a_bootstrap_worked_by_hand() -> None:
    rewards, values = f64([[1.0, 4.0], [1.0, 4.0]]), f64([[1.0, 3.0], [1.0, 3.0]])
    mask = torch.tensor([[YES, YES], [YES, NO]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap=f64([8.0, 6.0]))
    # row 0: 4 + 4 - 3 = 5 and 1 + 1.5 - 1 + 5 / 2 = 4; row 1: its only token is followed by the 6: 1 + 3 - 1 = 3
    assert_close(advantages, [[4.0, 5.0], [3.0, 0.0]])
    assert_close(returns, [[5.0, 8.0], [4.0, 0.0]])


def test_one_token() -> None:
    advantages, returns = gae(f64([[2.0]]), f64([[0.5]]), torch.tensor([[YES]]), gamma=0.9, lam=0.9)
    assert_close(advantages, [[1.5]])
    assert_close(returns, [[2.0]])


def test_nothing_counted() -> None:
    nowhere = torch.zeros(2, 3, dtype=torch.bool)
    for result in gae(randn(2, 3), randn(2, 3), nowhere, gamma=0.9, lam=0.9, bootstrap=randn(2)):
        assert_close(result, torch.zeros(2, 3))


@given(masked_arrays(arrays=2), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.booleans())
def test_any_shape_against_the_double_sum(
    drawn: tuple[torch.Tensor, ...], gamma: float, lam: float, bootstrapped: bool
) -> None:
    mask, rewards, values = drawn
    bootstrap = randn(len(mask), seed=3) if bootstrapped else None
    expected = oracles.gae(rewards, values, mask, gamma, lam, bootstrap)
    for result, numbers in zip(gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap), expected):
        assert_close(result, f64(numbers), tol=1e-11)


@given(masked_arrays(arrays=2), st.floats(0.0, 1.0))
def test_lambda_one_is_reward_to_go_less_the_value(drawn: tuple[torch.Tensor, ...], gamma: float) -> None:
    mask, rewards, values = drawn
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    for b in range(len(mask)):
        to_go = 0.0
        for s in reversed(range(mask.shape[1])):
            if mask[b, s]:
                to_go = float(rewards[b, s]) + gamma * to_go
                assert_close(returns[b, s], f64(to_go), tol=1e-11)


@given(masked_arrays(arrays=2), st.floats(0.0, 1.0))
def test_lambda_zero_is_the_td_error(drawn: tuple[torch.Tensor, ...], gamma: float) -> None:
    mask, rewards, values = drawn
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=0.0)
    for b in range(len(mask)):
        following = 0.0
        for s in reversed(range(mask.shape[1])):
            if mask[b, s]:
                error = float(rewards[b, s]) + gamma * following - float(values[b, s])
                assert_close(advantages[b, s], f64(error), tol=1e-12)
                following = float(values[b, s])


@given(masks(), st.integers(0, 1000))
def test_a_perfect_critic_leaves_no_advantage(mask: torch.Tensor, seed: int) -> None:
    """If every value is the discounted reward to go, every TD error is 0, whatever λ."""
    rewards, values = randn(*mask.shape, seed=seed), torch.zeros(*mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        to_go = 0.0
        for s in reversed(range(mask.shape[1])):
            if mask[b, s]:
                to_go = float(rewards[b, s]) + 0.9 * to_go
                values[b, s] = to_go
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.7)
    assert_close(advantages, torch.zeros(*mask.shape), tol=1e-12)


@pytest.mark.parametrize("filling", POISONS)
def test_gae_does_not_read_off_the_mask(filling: float) -> None:
    mask = torch.tensor([[YES, NO, YES, YES, NO], [NO, NO, YES, NO, NO], [NO] * 5, [YES] * 5])
    rewards, values = randn(4, 5, seed=1), randn(4, 5, seed=2)
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    dirty = gae(poison(rewards, mask, filling), poison(values, mask, filling), mask, gamma=0.9, lam=0.8)
    for one, other in zip(clean, dirty):
        assert torch.equal(one, other)


def test_advantages_carry_no_gradient() -> None:
    rewards, values, bootstrap = (x.requires_grad_() for x in (randn(2, 3), randn(2, 3, seed=1), randn(2)))
    mask = torch.ones(2, 3, dtype=torch.bool)
    for result in gae(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=bootstrap):
        assert not result.requires_grad


def test_rewards_of_another_dtype_than_the_values() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = gae(
        torch.tensor([[1.0, 2.0]]), f64([[0.5, 0.5]]), mask, gamma=1.0, lam=1.0, bootstrap=torch.tensor([1.0])
    )
    assert_close(advantages, [[3.5, 2.5]])
