from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.functional.oracles import (
    POISONS,
    f64,
    kept,
    masked_arrays,
    policy_term,
    ragged_mask,
    randn,
    value_term,
)
from tests.helpers import assert_close, poison
from trl.functional import importance_weights, policy_loss, value_loss

EVERY = torch.ones(1, 1, dtype=torch.bool)
MASK = torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, False, False]])
LOGPROBS, OLD, ADVANTAGES, WEIGHTS = (randn(3, 4, seed=i) for i in range(4))


def one(x: float) -> torch.Tensor:
    return f64([[x]])


# --- policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [  # ε = 0.2; the slope is that of the loss in the log-probability: -A · ratio where it is not held
        (1.0, 2.0, -2.0, 0, -2.0),
        (1.0, -2.0, 2.0, 0, 2.0),
        (1.5, 1.0, -1.2, 1, 0.0),  # better than allowed: held
        (0.5, 1.0, -0.5, 0, -0.5),  # worse: the way back stays open
        (1.5, -1.0, 1.5, 0, 1.5),  # worse: the way back stays open
        (0.5, -1.0, 0.8, 1, 0.0),  # better than allowed: held
        (1.1, 1.0, -1.1, 0, -1.1),
        (0.9, -1.0, 0.9, 0, 0.9),
        (1.5, 0.0, 0.0, 0, 0.0),
    ],
)
def test_surrogate_worked_by_hand(ratio: float, advantage: float, loss: float, clipped: int, slope: float) -> None:
    logprob = one(math.log(ratio) - 3.0).requires_grad_()
    result = policy_loss(logprob, one(-3.0), one(advantage), EVERY, clip_range=0.2)
    assert_close(result.loss.sum, loss)
    assert_close(result.clipped.sum, float(clipped))
    assert_close(result.ratio, [[ratio]])
    assert int(result.loss.count) == int(result.clipped.count) == 1
    result.loss.sum.backward()
    assert_close(logprob.grad, [[slope]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # c = 3
        (5.0, -2.0, 6.0, 0.0),  # bounded by -c · A
        (2.5, -2.0, 5.0, 5.0),  # within the bound
        (0.5, -2.0, 1.6, 0.0),  # the ordinary clip
        (5.0, 2.0, -2.4, 0.0),  # A > 0: the dual clip has no part
        (0.5, 2.0, -1.0, -1.0),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_worked_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprob = one(math.log(ratio)).requires_grad_()
    result = policy_loss(logprob, one(0.0), one(advantage), EVERY, clip_range=0.2, dual_clip=3.0)
    assert_close(result.loss.sum, loss)
    result.loss.sum.backward()
    assert_close(logprob.grad, [[slope]])


def test_weights_worked_by_hand() -> None:
    logprob = one(math.log(1.1)).requires_grad_()
    result = policy_loss(logprob, one(0.0), one(2.0), EVERY, clip_range=0.2, weights=one(0.5))
    assert_close(result.loss.sum, -1.1)
    assert_close(result.ratio, [[1.1]])  # the weight corrects the sampler; the ratio stays π / π_old
    result.loss.sum.backward()
    assert_close(logprob.grad, [[-1.1]])
    assert_close(result.clipped.sum, 0.0)


@given(masked_arrays(arrays=4), st.floats(0.01, 0.9), st.one_of(st.none(), st.floats(1.01, 5.0)), st.booleans())
def test_any_shape_against_the_case_table(
    drawn: tuple[torch.Tensor, ...], epsilon: float, dual_clip: float | None, weighted: bool
) -> None:
    mask, logprobs, old, advantages, raw = drawn
    weights = raw.exp() if weighted else None
    result = policy_loss(logprobs, old, advantages, mask, clip_range=epsilon, dual_clip=dual_clip, weights=weights)
    ratios = [math.exp(new - before) for new, before in zip(kept(logprobs, mask), kept(old, mask))]
    signed = list(zip(ratios, kept(advantages, mask)))
    terms = [policy_term(ratio, advantage, epsilon, dual_clip) for ratio, advantage in signed]
    if weights is not None:
        terms = [weight * term for weight, term in zip(kept(weights, mask), terms)]
    assert_close(result.loss.sum, f64(math.fsum(terms)), tol=1e-11)
    held = sum((r > 1 + epsilon and a > 0) or (r < 1 - epsilon and a < 0) for r, a in signed)
    assert (int(result.loss.count), int(result.clipped.count), int(result.clipped.sum)) == (len(terms),) * 2 + (held,)
    assert_close(f64(kept(result.ratio, mask)), f64(ratios), tol=1e-12)
    assert bool((result.ratio.masked_fill(mask, 1.0) == 1.0).all())


def test_on_policy_the_gradient_is_that_of_the_policy_gradient() -> None:
    """At ratio 1 nothing is clipped, and d loss / d log π(a) = -A: REINFORCE with a baseline."""
    logprobs = OLD.clone().requires_grad_()
    policy_loss(logprobs, OLD, ADVANTAGES, MASK, clip_range=0.2, dual_clip=2.0).loss.sum.backward()
    assert_close(logprobs.grad, -ADVANTAGES.masked_fill(~MASK, 0.0), tol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS.exp()])
@pytest.mark.parametrize("clip_range", [0.05, 0.2, 0.9])
def test_gradient_of_the_policy_loss(dual_clip: float | None, weights: torch.Tensor | None, clip_range: float) -> None:
    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return policy_loss(
            logprobs, OLD, ADVANTAGES, MASK, clip_range=clip_range, dual_clip=dual_clip, weights=weights
        ).loss.sum

    assert torch.autograd.gradcheck(loss, (LOGPROBS.clone().requires_grad_(),))


def test_gradients_of_the_policy_loss_flow_into_the_policy_alone() -> None:
    leaves = [x.clone().requires_grad_() for x in (LOGPROBS, OLD, ADVANTAGES, WEIGHTS)]
    logprobs, old, advantages, weights = leaves
    result = policy_loss(logprobs, old, advantages, MASK, clip_range=0.2, dual_clip=3.0, weights=weights)
    result.loss.sum.backward()
    assert logprobs.grad is not None
    assert old.grad is None and advantages.grad is None and weights.grad is None
    assert not result.ratio.requires_grad and not result.clipped.sum.requires_grad


@pytest.mark.parametrize("filling", POISONS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss_does_not_read_off_the_mask(filling: float, dual_clip: float | None) -> None:
    results = []
    for dirt in (None, filling):
        inputs = [x.clone() if dirt is None else poison(x, MASK, dirt) for x in (LOGPROBS, OLD, ADVANTAGES, WEIGHTS)]
        logprobs = inputs[0].requires_grad_()
        result = policy_loss(logprobs, *inputs[1:3], MASK, clip_range=0.2, dual_clip=dual_clip, weights=inputs[3])
        result.loss.sum.backward()
        results.append((result.loss.sum.detach(), result.clipped.sum, result.ratio, logprobs.grad))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)
    assert float(results[1][3].masked_fill(MASK, 0.0).abs().sum()) == 0.0


def test_no_tokens_no_policy_loss() -> None:
    logprobs = LOGPROBS.clone().requires_grad_()
    nowhere = torch.zeros_like(MASK)
    result = policy_loss(logprobs, OLD, ADVANTAGES, nowhere, clip_range=0.2)
    result.loss.mean().backward()  # every process must be able to call backward
    assert result.loss.mean().item() == 0.0 and float(logprobs.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_that_is_no_bound_is_refused(dual_clip: float) -> None:
    with pytest.raises(ValueError, match=f"dual_clip={dual_clip}"):
        policy_loss(LOGPROBS, OLD, ADVANTAGES, MASK, clip_range=0.2, dual_clip=dual_clip)


# --- value --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped", "error", "slope"),
    [  # held within ± 0.5 of the old value
        (1.2, 1.0, 3.0, 1.62, 0, 3.24, -1.8),  # nothing to hold
        (2.0, 1.0, 3.0, 1.125, 1, 1.0, 0.0),  # 1.5 is further from 3 than 2 is
        (2.0, 1.0, 0.0, 2.0, 0, 4.0, 2.0),  # 2 is further from 0 than 1.5 is
        (0.0, 1.0, -1.0, 1.125, 1, 1.0, 0.0),
        (0.0, 1.0, 2.0, 2.0, 0, 4.0, -2.0),
        (1.0, 1.0, 1.0, 0.0, 0, 0.0, 0.0),
    ],
)
def test_value_loss_worked_by_hand(
    value: float, old: float, target: float, loss: float, clipped: int, error: float, slope: float
) -> None:
    leaf = one(value).requires_grad_()
    result = value_loss(leaf, one(old), one(target), EVERY, clip_range=0.5)
    assert_close(result.loss.sum, loss)
    assert_close(result.clipped.sum, float(clipped))
    assert_close(result.error.sum, error)
    assert int(result.loss.count) == int(result.clipped.count) == int(result.error.count) == 1
    result.loss.sum.backward()
    assert_close(leaf.grad, [[slope]])


@given(masked_arrays(arrays=3), st.floats(0.01, 3.0))
def test_any_shape_against_the_larger_square(drawn: tuple[torch.Tensor, ...], clip_range: float) -> None:
    mask, values, old, returns = drawn
    result = value_loss(values, old, returns, mask, clip_range=clip_range)
    numbers = list(zip(kept(values, mask), kept(old, mask), kept(returns, mask)))
    assert_close(result.loss.sum, f64(math.fsum(value_term(*n, clip_range) for n in numbers)), tol=1e-11)
    assert_close(result.error.sum, f64(math.fsum((v - r) ** 2 for v, _, r in numbers)), tol=1e-11)
    held = sum(value_term(*n, clip_range) > (n[0] - n[2]) ** 2 / 2 for n in numbers)
    assert (int(result.clipped.sum), int(result.loss.count)) == (held, len(numbers))


@given(masked_arrays(arrays=3))
def test_with_a_wide_range_it_is_half_the_squared_error(drawn: tuple[torch.Tensor, ...]) -> None:
    mask, values, old, returns = drawn
    assume(bool(mask.any()))
    result = value_loss(values, old, returns, mask, clip_range=math.inf)
    numbers = list(zip(kept(values, mask), kept(returns, mask)))
    expected = math.fsum((v - r) ** 2 for v, r in numbers) / 2 / len(numbers)
    assert_close(result.loss.mean(), f64(expected), tol=1e-11)
    assert int(result.clipped.sum) == 0


@pytest.mark.parametrize("clip_range", [0.05, 0.5, 5.0])
def test_gradient_of_the_value_loss(clip_range: float) -> None:
    def loss(values: torch.Tensor) -> torch.Tensor:
        return value_loss(values, OLD, ADVANTAGES, MASK, clip_range=clip_range).loss.sum

    assert torch.autograd.gradcheck(loss, (LOGPROBS.clone().requires_grad_(),))


def test_gradients_of_the_value_loss_flow_into_the_critic_alone() -> None:
    values, old, returns = (x.clone().requires_grad_() for x in (LOGPROBS, OLD, ADVANTAGES))
    result = value_loss(values, old, returns, MASK, clip_range=0.2)
    result.loss.sum.backward()
    assert values.grad is not None and old.grad is None and returns.grad is None
    assert not result.error.sum.requires_grad and not result.clipped.sum.requires_grad


@pytest.mark.parametrize("filling", POISONS)
def test_value_loss_does_not_read_off_the_mask(filling: float) -> None:
    results = []
    for dirt in (None, filling):
        inputs = [x.clone() if dirt is None else poison(x, MASK, dirt) for x in (LOGPROBS, OLD, ADVANTAGES)]
        values = inputs[0].requires_grad_()
        result = value_loss(values, *inputs[1:], MASK, clip_range=0.2)
        result.loss.sum.backward()
        results.append((result.loss.sum.detach(), result.clipped.sum, result.error.sum, values.grad))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


def test_no_tokens_no_value_loss() -> None:
    values = LOGPROBS.clone().requires_grad_()
    result = value_loss(values, OLD, ADVANTAGES, torch.zeros_like(MASK), clip_range=0.2)
    result.loss.mean().backward()
    assert result.loss.mean().item() == 0.0 and float(values.grad.abs().sum()) == 0.0


# --- importance weights -------------------------------------------------------------------------------------------


def test_importance_weights_worked_by_hand() -> None:
    old, sampler = (
        f64([[math.log(0.5), math.log(0.2), math.log(0.9)]]),
        f64([[math.log(0.25), math.log(0.4), -9.0]]),
    )
    mask = torch.tensor([[True, True, True]])
    assert_close(importance_weights(old, sampler, mask, cap=3.0), [[2.0, 0.5, 3.0]])
    mask = torch.tensor([[True, False, True]])
    assert_close(importance_weights(old, sampler, mask, cap=1.5), [[1.5, 1.0, 1.5]])


def test_importance_weights_of_the_sampler_itself_are_one() -> None:
    assert torch.equal(importance_weights(OLD, OLD, MASK, cap=2.0), torch.ones_like(OLD))


@pytest.mark.parametrize("filling", POISONS)
def test_importance_weights_do_not_read_off_the_mask(filling: float) -> None:
    clean = importance_weights(OLD, LOGPROBS, MASK, cap=2.0)
    for old, sampler in ((poison(OLD, MASK, filling), LOGPROBS), (OLD, poison(LOGPROBS, MASK, filling))):
        assert torch.equal(importance_weights(old, sampler, MASK, cap=2.0), clean)


def test_importance_weights_carry_no_gradient() -> None:
    old, sampler = OLD.clone().requires_grad_(), LOGPROBS.clone().requires_grad_()
    assert not importance_weights(old, sampler, MASK, cap=2.0).requires_grad


def test_ragged_rows_count_tokens_not_sequences() -> None:
    mask = ragged_mask([4, 1], 4)
    result = policy_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4), mask, clip_range=0.2)
    assert int(result.loss.count) == 5
    assert_close(result.loss.sum, -5.0)
