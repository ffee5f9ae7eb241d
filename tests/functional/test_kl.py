from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.functional.oracles import f64, randn, softmax
from tests.helpers import assert_close
from trl.functional import adaptive_kl_coef, exact_kl, k1, k1_abs, k2, k3

LOG = math.log
P, Q = [0.5, 0.5], [0.25, 0.75]
DIVERGENCE = 0.5 * LOG(2) + 0.5 * LOG(2 / 3)  # KL(P || Q), by the definition


def test_estimators_worked_by_hand() -> None:
    logp, logq = torch.tensor([LOG(0.5), LOG(0.5)]), torch.tensor([LOG(0.25), LOG(0.75)])
    assert_close(k1(logp, logq), [LOG(2), LOG(2 / 3)])
    assert_close(k1_abs(logp, logq), [LOG(2), LOG(1.5)])
    assert_close(k2(logp, logq), [LOG(2) ** 2 / 2, LOG(1.5) ** 2 / 2])
    assert_close(k3(logp, logq), [0.5 - 1 + LOG(2), 1.5 - 1 - LOG(1.5)])


def test_no_difference_no_kl() -> None:
    same = randn(3, 5, seed=1)
    for estimate in (k1, k1_abs, k2, k3):
        assert float(estimate(same, same).abs().max()) == 0.0


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_signs(logp: float, logq: float) -> None:
    p, q = torch.tensor(logp, dtype=torch.float64), torch.tensor(logq, dtype=torch.float64)
    assert float(k1(p, q)) == -float(k1(q, p)) == logp - logq
    for estimate in (k1_abs, k2, k3):
        assert float(estimate(p, q)) >= 0.0
    assert float(k1_abs(p, q)) == abs(logp - logq)


def test_k3_keeps_its_digits_where_the_policies_almost_agree() -> None:
    """exp(x) - 1 - x has lost all of them in float32: at x = 1e-3 the answer is 5.0017e-7, an ulp of 1 is 1.2e-7."""
    x = 1e-3
    expected = x**2 / 2 + x**3 / 6 + x**4 / 24
    estimate = k3(torch.tensor(0.0), torch.tensor(x))
    assert_close(estimate / expected, 1.0, tol=5e-4)


def test_k1_and_k3_are_unbiased_k2_and_abs_are_not() -> None:
    p, logp = torch.tensor(P), torch.tensor(P).log()
    logq = torch.tensor(Q).log()
    assert_close((p * k1(logp, logq)).sum(), DIVERGENCE)
    assert_close((p * k3(logp, logq)).sum(), DIVERGENCE)
    assert float((p * k2(logp, logq)).sum()) > DIVERGENCE + 0.01
    assert float((p * k1_abs(logp, logq)).sum()) > DIVERGENCE + 0.1


def test_exact_kl_worked_by_hand() -> None:
    assert_close(exact_kl(torch.tensor(P).log(), torch.tensor(Q).log()), DIVERGENCE)
    shifted = torch.tensor(P).log() + 7.0  # logits are free up to a constant
    assert_close(exact_kl(shifted, torch.tensor(Q).log() - 3.0), DIVERGENCE)
    # At temperature 2 the odds are square roots: q becomes 1 : sqrt(3).
    low, high = 1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))
    expected = 0.5 * LOG(0.5 / low) + 0.5 * LOG(0.5 / high)
    assert_close(exact_kl(torch.tensor(P).log(), torch.tensor(Q).log(), temperature=2.0), expected)


def test_exact_kl_against_plain_python() -> None:
    logits, ref_logits = 3 * randn(2, 4, 6, seed=3), 3 * randn(2, 4, 6, seed=4)
    result = exact_kl(logits, ref_logits, temperature=0.7)
    assert result.shape == (2, 4)
    for b in range(2):
        for s in range(4):
            p, q = softmax(logits[b, s].tolist(), 0.7), softmax(ref_logits[b, s].tolist(), 0.7)
            assert_close(result[b, s], f64(math.fsum(x * LOG(x / y) for x, y in zip(p, q))), tol=1e-12)
    assert float(result.min()) >= 0.0


def test_exact_kl_with_words_ruled_out() -> None:
    never = -math.inf
    both = exact_kl(torch.tensor([0.0, 0.0, never]), torch.tensor([LOG(0.25), LOG(0.75), never]))
    assert_close(both, DIVERGENCE)
    policy_only = exact_kl(torch.tensor([0.0, never]), torch.tensor([0.0, 0.0]))
    assert_close(policy_only, LOG(2))
    assert math.isinf(float(exact_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, never]))))


def test_exact_kl_with_words_ruled_out_has_a_finite_gradient() -> None:
    """Logits after a top-k filter hold -inf; as a loss, 0 · nan must not come back through the words it ruled out."""
    logits = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    exact_kl(logits, torch.tensor([LOG(0.25), LOG(0.75), -math.inf], dtype=torch.float64)).backward()
    # d KL / d x_i = p_i (log p_i / q_i - KL)
    expected = [0.5 * (LOG(2) - DIVERGENCE), 0.5 * (LOG(2 / 3) - DIVERGENCE), 0.0]
    assert_close(logits.grad, expected)


@pytest.mark.parametrize("estimate", [k1, k1_abs, k2, k3])
def test_gradients_of_the_estimators(estimate: object) -> None:
    logp, logq = randn(2, 3, seed=5).requires_grad_(), randn(2, 3, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(estimate, (logp, logq))  # type: ignore[arg-type]


def test_gradient_of_the_exact_kl() -> None:
    logits, ref_logits = randn(2, 3, 5, seed=7).requires_grad_(), randn(2, 3, 5, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: exact_kl(x, y, temperature=1.3), (logits, ref_logits))


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 256 / 10_000),  # 10% above
        (5.4, 1 - 0.1 * 256 / 10_000),  # 10% below
        (600.0, 1 + 0.2 * 256 / 10_000),  # clipped
        (0.0, 1 - 0.2 * 256 / 10_000),  # clipped
        (-3.0, 1 - 0.2 * 256 / 10_000),  # an estimate may be negative
    ],
)
def test_adaptive_coefficient_worked_by_hand(kl: float, factor: float) -> None:
    assert math.isclose(adaptive_kl_coef(0.2, kl, target=6.0, horizon=10_000, episodes=256), 0.2 * factor)


def test_adaptive_coefficient_of_zero_stays_zero() -> None:
    assert adaptive_kl_coef(0.0, 50.0, target=6.0, horizon=100, episodes=10) == 0.0


def test_adaptive_coefficient_of_a_batch_beyond_the_horizon_moves_by_a_fifth() -> None:
    """64 episodes at a horizon of 10: 1 - 0.2 * 64 / 10 = -0.28 would make a penalty a reward."""
    assert math.isclose(adaptive_kl_coef(0.2, 0.0, target=6.0, horizon=10, episodes=64), 0.2 * 0.8)
    assert math.isclose(adaptive_kl_coef(0.2, 600.0, target=6.0, horizon=10, episodes=64), 0.2 * 1.2)
    assert math.isclose(adaptive_kl_coef(0.2, 0.0, target=6.0, horizon=10, episodes=10), 0.2 * 0.8)


def test_adaptive_coefficient_outlives_a_kl_that_is_not_a_number() -> None:
    assert adaptive_kl_coef(0.2, math.nan, target=6.0, horizon=100, episodes=10) == 0.2
    assert math.isclose(adaptive_kl_coef(0.2, math.inf, target=6.0, horizon=100, episodes=10), 0.2 * 1.02)
