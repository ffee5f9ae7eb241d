from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.functional.oracles import f64, randn
from tests.helpers import assert_close
from trl.functional.preferences import (
    apo_down_loss,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    pairwise_loss,
    preference_reliability,
    reliability,
    robust_loss,
    sigmoid_loss,
)

MARGINS = [-3.0, -0.5, 0.0, 0.25, 2.0]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_pairwise_by_hand() -> None:
    """A gap of log 3 has the probability 3/4."""
    loss = pairwise_loss(f64([math.log(3.0), 0.0]), f64([0.0, 0.0]))
    assert_close(loss, [-math.log(0.75), math.log(2.0)])


def test_pairwise_margin_moves_the_gap_and_centring_the_mean() -> None:
    chosen, rejected, margin = f64([2.0, 1.0]), f64([0.5, -1.0]), f64([1.5, 0.5])
    expected = [-log_sigmoid(0.0) + 0.01 * 2.5**2, -log_sigmoid(1.5)]
    assert_close(pairwise_loss(chosen, rejected, margin=margin, centring=0.01), expected)


def test_pairwise_does_not_overflow() -> None:
    chosen = f64([1e4, -1e4]).requires_grad_()
    loss = pairwise_loss(chosen, f64([0.0, 0.0]))
    assert_close(loss, [0.0, 1e4])
    loss.sum().backward()
    assert_close(chosen.grad, [0.0, -1.0])


@pytest.mark.parametrize("margin", MARGINS)
def test_dpo_losses_by_their_formulas(margin: float) -> None:
    m, beta, eps = f64([margin]), 0.3, 0.1
    win, loss = log_sigmoid(beta * margin), log_sigmoid(-beta * margin)
    assert_close(sigmoid_loss(m, beta=beta), [-win])
    assert_close(sigmoid_loss(m, beta=beta, smoothing=eps), [-0.9 * win - 0.1 * loss])
    assert_close(sigmoid_loss(m, beta=beta, offset=0.5), [-log_sigmoid(beta * margin - 0.5)])
    assert_close(robust_loss(m, beta=beta, smoothing=eps), [(-0.9 * win + 0.1 * loss) / 0.8])
    assert_close(hinge_loss(m, beta=beta), [max(0.0, 1 - beta * margin)])
    assert_close(ipo_loss(m, beta=beta), [(margin - 1 / 0.6) ** 2])


@pytest.mark.parametrize("margin", MARGINS)
def test_robust_is_unbiased_under_flipped_labels(margin: float) -> None:
    """E over flips of the robust loss is the loss of clean labels."""
    flipped = 0.9 * robust_loss(f64([margin]), beta=0.5, smoothing=0.1) + 0.1 * robust_loss(
        f64([-margin]), beta=0.5, smoothing=0.1
    )
    assert_close(flipped, [-log_sigmoid(0.5 * margin)])


def test_ipo_is_least_at_half_the_inverse_of_beta() -> None:
    margin = f64([1 / (2 * 0.1)]).requires_grad_()
    loss = ipo_loss(margin, beta=0.1)
    loss.sum().backward()
    assert_close(loss, [0.0])
    assert_close(margin.grad, [0.0])


def test_odds_ratio_by_hand() -> None:
    """p = 3/4 has odds 3, p = 1/2 odds 1: the ratio 3 has log σ(log 3) = log 3/4."""
    assert_close(odds_ratio_loss(f64([math.log(0.75)]), f64([math.log(0.5)])), [-math.log(0.75)])


def test_odds_of_very_likely_and_very_unlikely_responses_are_finite() -> None:
    chosen = f64([-1e-12, -50.0]).requires_grad_()
    loss = odds_ratio_loss(chosen, f64([-50.0, -1e-12]))
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(chosen.grad).all())  # type: ignore[arg-type]


def test_kto_by_hand() -> None:
    """With β = 1 and z = 0, a log-ratio of log 3 has σ = 3/4; an undesirable one loses what a desirable one gains."""
    ratios, desirable = f64([math.log(3.0), math.log(3.0)]), torch.tensor([True, False])
    loss = kto_loss(ratios, desirable, f64(0.0), beta=1.0, desirable_weight=2.0, undesirable_weight=0.5)
    assert_close(loss, [2.0 * 0.25, 0.5 * 0.75])


def test_kto_baseline_is_not_negative_and_has_no_gradient() -> None:
    baseline = f64(-1.0).requires_grad_()
    ratios = f64([0.3, -0.2]).requires_grad_()
    desirable = torch.tensor([True, False])
    loss = kto_loss(ratios, desirable, baseline, beta=0.5)
    assert_close(loss, kto_loss(ratios, desirable, f64(0.0), beta=0.5))
    loss.sum().backward()
    assert baseline.grad is None
    raised = kto_loss(ratios, desirable, f64(1.0), beta=0.5)
    assert_close(raised, [1 - 1 / (1 + math.exp(0.35)), 1 - 1 / (1 + math.exp(-0.6))])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: pairwise_loss(x, -0.3 * x, margin=torch.linspace(0, 1, 5), centring=0.1),
        lambda x: sigmoid_loss(x, beta=0.4, smoothing=0.2, offset=0.3),
        lambda x: robust_loss(x, beta=0.4, smoothing=0.2),
        lambda x: hinge_loss(x, beta=0.4),
        lambda x: ipo_loss(x, beta=0.4),
        lambda x: odds_ratio_loss(-x.exp(), -(x.flip(0) / 2).exp()),
        lambda x: kto_loss(x, torch.arange(5) % 2 == 0, torch.tensor(0.4), beta=0.4, undesirable_weight=1.5),
    ],
)
def test_gradients(loss: Callable[[Tensor], Tensor]) -> None:
    margins = randn(5, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (margins,))


def test_reliability_by_hand() -> None:
    """Two predictions in each of two bins of five: 0.1 and 0.15 (one true), 0.9 and 1.0 (both true)."""
    result = reliability(torch.tensor([0.1, 0.15, 0.9, 1.0]), torch.tensor([True, False, True, True]), bins=5)
    assert result.count.tolist() == [2, 0, 0, 0, 2]
    assert_close(result.confidence[[0, 4]], [0.125, 0.95])
    assert_close(result.frequency[[0, 4]], [0.5, 1.0])
    assert bool(result.frequency[1:4].isnan().all())
    assert_close(result.error, (2 * 0.375 + 2 * 0.05) / 4)


def test_predictions_that_are_true_as_often_as_they_say_are_calibrated() -> None:
    labels = torch.tensor([True] * 3 + [False] * 7)
    assert_close(reliability(torch.full((10,), 0.3), labels).error, 0.0)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_reliability_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        reliability(torch.tensor([0.5, wrong]), torch.tensor([True, False]))


@pytest.mark.parametrize(("chosen", "rejected"), [(0.7, -0.4), (-2.0, 1.5), (0.0, 0.0)])
def test_apo_losses_by_their_formulas(chosen: float, rejected: float) -> None:
    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    w, l, beta = f64([chosen]), f64([rejected]), 0.3  # noqa: E741
    zero = 1 - sigma(beta * chosen) + sigma(beta * rejected)
    down = sigma(beta * chosen) + 1 - sigma(beta * (chosen - rejected))
    assert_close(apo_zero_loss(w, l, beta=beta), [zero])
    assert_close(apo_down_loss(w, l, beta=beta), [down])


def test_preference_reliability_by_hand() -> None:
    """Four pairs at a gap of ±log 3 are predicted with probability 3/4; three of four predictions are right."""
    gap = math.log(3.0)
    diagram = preference_reliability(f64([gap, gap, gap, -gap]), bins=10)
    assert diagram.count.tolist() == [0, 0, 0, 0, 0, 0, 0, 4, 0, 0]
    assert_close(diagram.confidence[7], 0.75)
    assert_close(diagram.frequency[7], 0.75)
    assert_close(diagram.error, 0.0)


def test_rewards_that_are_too_sure_are_miscalibrated() -> None:
    """A hundred times the gaps, at the same share of right predictions: probability 1, right three times of four."""
    gap = 100 * math.log(3.0)
    assert_close(preference_reliability(f64([gap, gap, gap, -gap])).error, 0.25)


def test_rewards_that_say_nothing_are_wrong_half_the_time_at_best() -> None:
    diagram = preference_reliability(f64([0.0, 0.0]))
    assert diagram.count[10] == 2 and diagram.frequency[10] == 0.0
    assert_close(diagram.error, 0.5)
