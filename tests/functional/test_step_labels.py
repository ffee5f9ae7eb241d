"""Losses of process reward models: by hand, by brute force in float64, as a softmax, and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from tests.functional.oracles import f64, randn
from tests.helpers import assert_close
from trl.functional.step_labels import step_logits, step_loss


def test_by_hand() -> None:
    """At log-odds of log 3 a step is right with probability 3/4."""
    z = f64([math.log(3)] * 3)
    expected = [-math.log(0.75), -math.log(0.25), -0.5 * math.log(0.75) - 0.5 * math.log(0.25)]
    assert_close(step_loss(z, f64([1.0, 0.0, 0.5])), f64(expected), 1e-12)


def test_brute_force() -> None:
    z, q = 3 * randn(50, seed=1), randn(50, seed=2).sigmoid()
    chances = [1 / (1 + math.exp(-x)) for x in z.tolist()]
    expected = [-t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(chances, q.tolist(), strict=True)]
    assert_close(step_loss(z, q), f64(expected), 1e-12)


def test_two_outputs_are_the_softmax_over_wrong_and_right() -> None:
    outputs = randn(7, 2, seed=3)
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    expected = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    assert_close(step_loss(step_logits(outputs), labels.double()), expected, 1e-12)
    assert_close(step_logits(outputs[:, :1]), outputs[:, 0])
    with pytest.raises(ValueError, match="has 1 or 2 outputs, not 3"):
        step_logits(randn(7, 3))


def test_gradients_and_extremes() -> None:
    z = (2 * randn(6, seed=4)).requires_grad_()
    q = f64([0.0, 1.0, 0.3, 0.9, 1.0, 0.0])
    assert torch.autograd.gradcheck(lambda z: step_loss(z, q), (z,))
    far = torch.tensor([200.0, -200.0], requires_grad=True)
    step_loss(far, torch.tensor([0.0, 1.0])).sum().backward()
    assert_close(far.grad, torch.tensor([1.0, -1.0]))
