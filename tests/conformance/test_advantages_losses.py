"""Advantages and losses: lines 19 to 32 of the list of what PPO codebases have got wrong."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.functional import oracles
from tests.functional.oracles import (
    POISONS,
    Ranks,
    f64,
    kept,
    masked_arrays,
    policy_term,
    ragged_mask,
    randn,
    value_term,
)
from tests.helpers import assert_close, poison
from trl.functional import (
    entropy,
    exact_kl,
    gae,
    importance_weights,
    k2,
    k3,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    masked_whiten,
    policy_loss,
    shape_rewards,
    token_logprobs,
    value_loss,
)
from trl.types import Tally

pytestmark = pytest.mark.conformance

YES, NO = True, False
STABLE = settings(derandomize=True, deadline=None, max_examples=50)


# --- 19, 20, 24: advantages ---------------------------------------------------------------------------------------


@STABLE
@given(masked_arrays(arrays=2), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_19_gae_is_the_double_sum_it_is_defined_as(drawn: tuple[torch.Tensor, ...], gamma: float, lam: float) -> None:
    """Off by one in the next value, γ for γλ, or a recursion that runs in from the padding: all train, a little worse."""
    mask, rewards, values = drawn
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected_advantages, expected_returns = oracles.gae(rewards, values, mask, gamma, lam)
    assert_close(advantages, f64(expected_advantages), tol=1e-11)
    assert_close(returns, f64(expected_returns), tol=1e-11)


def test_19_in_float32_it_stays_close_to_the_float64_sum() -> None:
    """A long response at γ = λ = 1 adds up a thousand terms."""
    rewards, values = randn(2, 1000, seed=1), randn(2, 1000, seed=2)
    mask = ragged_mask([1000, 600], 1000)
    advantages, _ = gae(rewards.float(), values.float(), mask, gamma=1.0, lam=0.95)
    assert_close(advantages, f64(oracles.gae(rewards, values, mask, 1.0, 0.95)[0]))


def test_19_lambda_one_is_reward_to_go_less_the_baseline_and_lambda_zero_the_td_error() -> None:
    rewards, values, mask = f64([[1.0, 2.0, 4.0]]), f64([[0.5, 0.25, 2.0]]), torch.ones(1, 3).bool()
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=1.0)
    assert_close(returns, [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4.0]])
    assert_close(advantages, [[2.5, 3.75, 2.0]])
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    assert_close(advantages, [[1 + 0.125 - 0.5, 2 + 1.0 - 0.25, 4.0 - 2.0]])


@pytest.mark.parametrize("hole", [[1], [2, 3], [1, 2, 5]])
@pytest.mark.parametrize("filling", [0.0, *POISONS])
def test_20_observations_leave_the_advantages_unchanged(hole: list[int], filling: float) -> None:
    """A recursion that multiplies by the mask stops at a tool's output: nothing before the call learns of the score."""
    seen = [column for column in range(7) if column not in hole]
    rewards, values = randn(1, len(seen), seed=1), randn(1, len(seen), seed=2)
    short = gae(rewards, values, torch.ones(1, len(seen)).bool(), gamma=0.9, lam=0.8)
    mask = torch.tensor([[column in seen for column in range(7)]])
    wide_rewards, wide_values = (torch.full((1, 7), filling, dtype=torch.float64) for _ in range(2))
    wide_rewards[mask], wide_values[mask] = rewards[0], values[0]
    for one, other in zip(short, gae(wide_rewards, wide_values, mask, gamma=0.9, lam=0.8)):
        assert torch.equal(one[0], other[mask])


def test_24_what_follows_the_last_token_is_worth_nothing_unless_asked() -> None:
    """The value at the token after eos, read from the padding, leaks a bootstrap into every finished response."""
    rewards, values = f64([[0.0, 1.0, 77.0]]), f64([[0.2, 0.3, 55.0]])
    mask = torch.tensor([[YES, YES, NO]])
    finished, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert_close(finished[0, :2], [0.9 * 1.0 - 0.2, 1.0 - 0.3])
    cut, _ = gae(rewards, values, mask, gamma=0.9, lam=1.0, bootstrap=f64([5.0]))
    assert_close(cut[0, :2], [0.9 * (1.0 + 0.9 * 5.0) - 0.2, 1.0 + 0.9 * 5.0 - 0.3])


# --- 21, 22, 23: masks and statistics -----------------------------------------------------------------------------

MASK = torch.tensor([[YES, NO, YES, YES], [NO, NO, NO, NO], [YES, YES, NO, NO], [NO, NO, NO, YES]])
ARRAYS = [randn(4, 4, seed=i) for i in range(5)]
MASKED = {
    "masked_sum": lambda m, a, b, c, d, e: masked_sum(a, m),
    "masked_mean": lambda m, a, b, c, d, e: masked_mean(a, m, dim=1),
    "masked_var": lambda m, a, b, c, d, e: masked_var(a, m),
    "masked_whiten": lambda m, a, b, c, d, e: masked_whiten(a, m),
    "masked_whiten, mean kept": lambda m, a, b, c, d, e: masked_whiten(a, m, shift_mean=False),
    "tally": lambda m, a, b, c, d, e: Tally.of(a, m).mean(),
    "policy_loss": lambda m, a, b, c, d, e: policy_loss(a, b, c, m, clip_range=0.2).loss.sum,
    "policy_loss, dual clip and weights": lambda m, a, b, c, d, e: (
        policy_loss(a, b, c, m, clip_range=0.2, dual_clip=2.0, weights=d).loss.sum
    ),
    "policy_loss, clip fraction": lambda m, a, b, c, d, e: policy_loss(a, b, c, m, clip_range=0.2).clipped.sum,
    "policy_loss, ratio": lambda m, a, b, c, d, e: policy_loss(a, b, c, m, clip_range=0.2).ratio,
    "value_loss": lambda m, a, b, c, d, e: value_loss(a, b, c, m, clip_range=0.2).loss.sum,
    "value_loss, error": lambda m, a, b, c, d, e: value_loss(a, b, c, m, clip_range=0.2).error.sum,
    "value_loss, clip fraction": lambda m, a, b, c, d, e: value_loss(a, b, c, m, clip_range=0.2).clipped.sum,
    "shape_rewards": lambda m, a, b, c, d, e: shape_rewards(e[:, 3], a, m, kl_coef=0.2, token_rewards=b)[0],
    "gae": lambda m, a, b, c, d, e: torch.stack(gae(a, b, m, gamma=0.9, lam=0.9)),
    "importance_weights": lambda m, a, b, c, d, e: importance_weights(a, b, m, cap=2.0),
}


@pytest.mark.parametrize("filling", POISONS)
@pytest.mark.parametrize("name", MASKED)
def test_21_what_stands_on_padding_reaches_no_result_and_no_gradient(name: str, filling: float) -> None:
    """`(x * mask).sum()` is NaN as soon as padding holds one, and masking behind a square or an exponential keeps the
    value clean while its derivative is 0 · NaN. Everything is masked before it is used.
    """
    function, outcomes = MASKED[name], []
    for dirt in (None, filling):
        first, *rest = (x.clone() if dirt is None else poison(x, MASK, dirt) for x in ARRAYS)
        first.requires_grad_()
        rest[3] = ARRAYS[4]  # [B] scores are taken from here: they have no padding
        result = function(MASK, first, *rest)
        slope = torch.zeros_like(first)
        if result.requires_grad:
            (slope,) = torch.autograd.grad((result * randn(*result.shape, seed=9)).sum(), first)
        outcomes.append((result.detach(), slope))
    (result, slope), (dirty_result, dirty_slope) = outcomes
    assert bool(result.isfinite().all()) and torch.equal(result, dirty_result)
    assert bool(slope.isfinite().all()) and torch.equal(slope, dirty_slope)


def test_22_the_variance_is_that_of_a_sample() -> None:
    """Divided by n, the whitened advantages of a short minibatch are too large; 1, 3 and 8 have the variance 13."""
    values = f64([[1.0, 3.0, 50.0, 8.0]])
    assert_close(masked_var(values, torch.tensor([[YES, YES, NO, YES]])), 13.0)


@pytest.mark.parametrize("counted", [0, 1])
def test_22_one_valid_token_does_not_divide_by_zero(counted: int) -> None:
    """n / (n - 1) at n = 1 is what stops a run at its first one-token response."""
    mask = torch.arange(3)[None] < counted
    values = f64([[7.0, float("nan"), float("nan")]])
    assert float(masked_var(values, mask)) == 0.0
    for shift_mean in (YES, NO):
        assert bool(masked_whiten(values, mask, shift_mean).isfinite().all())


@pytest.mark.parametrize("cuts", [[8], [4, 4], [1, 7], [2, 3, 3], [1] * 8])
def test_23_whitening_spans_all_ranks_and_does_not_depend_on_the_sharding(cuts: list[int]) -> None:
    """Each rank whitening its own shard gives the same token another advantage on another number of machines.

    Ranks are threads that meet in a sum; one that asks for more sums than the others would hang here as on a cluster.
    """
    values, mask = randn(8, 5, seed=3) * 4 + 1, ragged_mask([5, 1, 0, 3, 2, 5, 4, 1], 5)
    numbers = kept(values, mask)
    mean, spread = statistics.fmean(numbers), math.sqrt(statistics.variance(numbers) + 1e-8)

    def rank(i: int, reduce):  # type: ignore[no-untyped-def]
        return masked_whiten(values.split(cuts)[i], mask.split(cuts)[i], reduce=reduce)

    whitened = torch.cat(Ranks(len(cuts)).run(rank))
    assert_close(f64(kept(whitened, mask)), f64([(x - mean) / spread for x in numbers]), tol=1e-10)


def test_23_a_rank_without_a_token_takes_part() -> None:
    """It has no mean of its own to average in: means of means are wrong, sums and counts are right."""

    def rank(i: int, reduce):  # type: ignore[no-untyped-def]
        return masked_moments(f64([[1.0, 2.0, 6.0]]), torch.tensor([[i == 0] * 3]), reduce)

    for mean, var, count in Ranks(2).run(rank):
        assert (float(mean), float(count)) == (3.0, 3.0)
        assert_close(var, 7.0)


# --- 26, 27: clipping ---------------------------------------------------------------------------------------------


def test_26_the_value_loss_takes_the_larger_error_and_halves_it_once() -> None:
    """The smaller one rewards leaving the trust region; a half in the loss and another in the coefficient is a quarter."""
    cases = [(2.0, 1.0, 3.0), (2.0, 1.0, 0.0), (1.1, 1.0, 3.0), (0.0, 1.0, -1.0), (1.0, 1.0, 1.0)]
    expected = [2.25 / 2, 4.0 / 2, 3.61 / 2, 2.25 / 2, 0.0]  # with ± 0.5 around the old value
    for (value, old, target), loss in zip(cases, expected):
        result = value_loss(f64([[value]]), f64([[old]]), f64([[target]]), torch.tensor([[YES]]), clip_range=0.5)
        assert_close(result.loss.sum, loss)
        assert_close(f64(value_term(value, old, target, 0.5)), f64(loss))  # the oracle below agrees with the hand
    values, old, returns, mask = (
        (randn(6, 5, seed=i) for i in range(3)),
        None,
        None,
        ragged_mask([5, 3, 0, 1, 4, 2], 5),
    )
    values, old, returns = values
    result = value_loss(values, old, returns, mask, clip_range=0.5)
    terms = [value_term(*n, 0.5) for n in zip(kept(values, mask), kept(old, mask), kept(returns, mask))]
    assert_close(result.loss.mean(), f64(statistics.fmean(terms)), tol=1e-12)


def test_27_the_policy_loss_is_the_larger_of_the_two_negated_surrogates() -> None:
    """The smaller one, or a clip without the comparison, lets a bad step run away: at A < 0 a grown ratio must cost."""
    logprobs, old, advantages = (randn(6, 5, seed=i) for i in range(3))
    mask = ragged_mask([5, 3, 0, 1, 4, 2], 5)
    result = policy_loss(logprobs, old, advantages, mask, clip_range=0.2)
    ratios = [math.exp(a - b) for a, b in zip(kept(logprobs, mask), kept(old, mask))]
    terms = [max(-a * r, -a * min(max(r, 0.8), 1.2)) for r, a in zip(ratios, kept(advantages, mask))]
    assert_close(result.loss.mean(), f64(statistics.fmean(terms)), tol=1e-12)
    table = [policy_term(r, a, 0.2) for r, a in zip(ratios, kept(advantages, mask))]
    assert_close(f64(table), f64(terms), tol=1e-12)  # two ways to say the same


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(10.0, -1.0, 3.0), (2.0, -1.0, 2.0), (0.1, -1.0, 0.8), (10.0, 1.0, -1.2), (0.1, 1.0, -0.1)],
)
def test_27_a_dual_clip_acts_on_negative_advantages_only(ratio: float, advantage: float, loss: float) -> None:
    """Applied to both signs it bounds the gain of a good token as well (c = 3)."""
    result = policy_loss(
        f64([[math.log(ratio)]]),
        f64([[0.0]]),
        f64([[advantage]]),
        torch.tensor([[YES]]),
        clip_range=0.2,
        dual_clip=3.0,
    )
    assert_close(result.loss.sum, loss)


# --- 30: two ratios -----------------------------------------------------------------------------------------------


def test_30_two_ratios_are_kept_apart_and_the_correction_is_detached() -> None:
    """π_old / π_sampler corrects for who sampled, π / π_old is clipped. Merged into π / π_sampler, the clip acts at the
    wrong place; with a gradient through the correction, the loss is no longer PPO's.
    """
    log = math.log
    old, sampler = f64([[log(0.30)]]), f64([[log(0.20)]])
    mask = torch.tensor([[YES]])
    logprobs = f64([[log(0.33)]]).requires_grad_()  # π / π_old = 1.1 is inside; π / π_sampler = 1.65 would be clipped
    weights = importance_weights(old.clone().requires_grad_(), sampler, mask, cap=2.0)
    assert not weights.requires_grad
    assert_close(weights, [[1.5]])
    result = policy_loss(logprobs, old, f64([[2.0]]), mask, clip_range=0.2, weights=weights)
    assert_close(result.loss.sum, -1.5 * 1.1 * 2.0)
    assert_close(result.ratio, [[1.1]])
    result.loss.sum.backward()
    assert_close(logprobs.grad, [[-1.5 * 1.1 * 2.0]])


def test_30_the_correction_makes_another_sampler_unbiased() -> None:
    """Expectation over a vocabulary of four: tokens from the sampler, weighted, give the policy's own gradient."""
    policy, advantage = softmaxed([0.3, -0.2, 0.8, 0.1]), [1.0, -2.0, 0.5, 3.0]
    sampler = softmaxed([0.0, 0.4, 0.3, -0.5])

    def expected_loss(sampled_from: list[float], weighted: bool) -> float:
        total = 0.0
        for a in range(4):
            old, seen, mask = (
                f64([[math.log(policy[a])]]),
                f64([[math.log(sampled_from[a])]]),
                torch.tensor([[YES]]),
            )
            weights = importance_weights(old, seen, mask, cap=100.0) if weighted else None
            loss = policy_loss(old, old, f64([[advantage[a]]]), mask, clip_range=0.2, weights=weights).loss.sum
            total += sampled_from[a] * float(loss)
        return total

    truth = -math.fsum(p * a for p, a in zip(policy, advantage))
    assert math.isclose(expected_loss(sampler, weighted=True), truth)
    assert not math.isclose(expected_loss(sampler, weighted=False), truth, rel_tol=0.05)


def softmaxed(logits: list[float]) -> list[float]:
    return oracles.softmax(logits)


# --- 32: gradients ------------------------------------------------------------------------------------------------

OLD, ADVANTAGES, RETURNS, WEIGHTS = (randn(4, 4, seed=i) for i in range(11, 15))
TOKENS = torch.randint(6, (4, 4), generator=torch.Generator().manual_seed(0))
LOSSES = {
    "policy": lambda x: policy_loss(x, OLD, ADVANTAGES, MASK, clip_range=0.2).loss.mean(),
    "policy, dual clip": lambda x: policy_loss(x, OLD, ADVANTAGES, MASK, clip_range=0.2, dual_clip=1.5).loss.mean(),
    "policy, weighted": lambda x: policy_loss(
        x, OLD, ADVANTAGES, MASK, clip_range=0.2, weights=WEIGHTS.exp()
    ).loss.mean(),
    "value": lambda x: value_loss(x, OLD, RETURNS, MASK, clip_range=0.2).loss.mean(),
    "k2": lambda x: masked_mean(k2(x, OLD), MASK),
    "k3": lambda x: masked_mean(k3(x, OLD), MASK),
}
LOGIT_LOSSES = {
    "logprobs": lambda x: masked_mean(token_logprobs(x, TOKENS, temperature=0.7, chunk_rows=3), MASK),
    "entropy": lambda x: masked_mean(entropy(x, temperature=0.7, chunk_rows=3), MASK),
    "exact kl": lambda x: masked_mean(exact_kl(x, randn(4, 4, 6, seed=20), temperature=0.7), MASK),
    "policy, from the logits": lambda x: policy_loss(
        token_logprobs(x, TOKENS, temperature=0.7, chunk_rows=5), OLD - 2, ADVANTAGES, MASK, clip_range=0.2
    ).loss.mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_32_analytic_gradients_match_finite_differences(name: str) -> None:
    """A hand-written backward pass, a detach too many or one too few: the loss still goes down."""
    assert torch.autograd.gradcheck(LOSSES[name], (randn(4, 4, seed=10).requires_grad_(),))


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_32_analytic_gradients_match_finite_differences_from_the_logits(name: str) -> None:
    """The chunked log-softmax has its own backward pass: it must know the temperature and both outputs."""
    assert torch.autograd.gradcheck(LOGIT_LOSSES[name], (randn(4, 4, 6, seed=10).requires_grad_(),))
