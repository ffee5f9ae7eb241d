"""Losses of supervised fine-tuning: values by hand, gradients by definition."""

from __future__ import annotations

import math

import torch

from tests.helpers import assert_close
from trl.functional.supervised import TOKEN_LOSSES, dft, nll


def test_values_by_hand() -> None:
    logprobs = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64)
    assert_close(nll(logprobs), torch.tensor([math.log(2), math.log(4)], dtype=torch.float64), tol=1e-12)
    assert_close(dft(logprobs), torch.tensor([0.5 * math.log(2), 0.25 * math.log(4)], dtype=torch.float64), tol=1e-12)
    assert set(TOKEN_LOSSES) == {"nll", "dft"}


def test_the_gradient_of_dft_is_that_of_the_probability() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    logprobs = torch.log_softmax(logits, dim=-1)[:, 3]
    (got,) = torch.autograd.grad(dft(logprobs).sum(), logits)
    (expected,) = torch.autograd.grad(-torch.softmax(logits, dim=-1)[:, 3].sum(), logits)
    assert_close(got, expected, tol=1e-12)
    assert torch.autograd.gradcheck(lambda x: nll(torch.log_softmax(x, dim=-1)[:, 3]), (logits,))
