"""Projection in blocks: what a plain softmax over all logits gives, whatever the blocks are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close
from trl.kernels import projection
from trl.kernels.projection import projected_logprobs_and_entropy as projected

BLOCKS = [None, (3, 7), (13, 50), (1, 1), (5, 64)]


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(13, 8, generator=random, dtype=dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=random, dtype=dtype).requires_grad_()
    bias = torch.randn(50, generator=random, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(50, (13,), generator=random)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, t: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits / t, dim=-1)
    return logp.gather(1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("kept", [0, 2**25])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_numbers_and_gradients(
    block: tuple[int, int] | None, kept: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_SAVED_BYTES", {"cpu": kept})
    hidden, weight, bias, tokens = case()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    slopes = torch.arange(13.0)
    found = []
    for pair in (
        projected(hidden, weight, tokens, bias=bias if with_bias else None, temperature=0.7, block=block),
        plain(hidden, weight, bias if with_bias else None, tokens, 0.7),
    ):
        grads = torch.autograd.grad((pair[0] * slopes).sum() + (pair[1] ** 2).sum(), inputs)
        found.append((*pair, *grads))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, tol=1e-11)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_of_the_gradients_alone(wanted: tuple[bool, bool]) -> None:
    hidden, weight, _, tokens = case()
    all_of_them = torch.autograd.grad(projected(hidden, weight, tokens)[0].sum(), (hidden, weight))
    hidden, weight = hidden.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])
    projected(hidden, weight, tokens)[0].sum().backward()
    for x, asked, grad in zip((hidden, weight), wanted, all_of_them, strict=True):
        assert (x.grad is not None) == asked
        if x.grad is not None:
            assert_close(x.grad, grad, tol=1e-12)


def test_a_common_offset_and_words_that_cannot_be_drawn() -> None:
    hidden, weight, _, tokens = case(torch.float32)
    shift = torch.full((50,), 3e4)
    assert_close(
        projected(hidden, weight, tokens, bias=shift, block=(4, 9))[0],
        plain(hidden.double(), weight.double(), None, tokens, 1.0)[0],
        tol=5e-3,  # the spacing of float32 at 3e4 is 2e-3
    )
    barred = torch.zeros(50)
    barred[:20] = -torch.inf  # the whole of the first two blocks
    tokens = tokens % 30 + 20
    got = projected(hidden, weight, tokens, bias=barred, block=(4, 9))
    assert_close(got[0], plain(hidden, weight, barred, tokens, 1.0)[0])
    assert got[1].isfinite().all()


def test_no_row_at_all() -> None:
    hidden, weight, _, tokens = case()
    logprobs, entropy = projected(hidden[:0], weight, tokens[:0])
    assert len(logprobs) == len(entropy) == 0
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_sums_of_many_rows_are_wide() -> None:
    """In bfloat16 a gradient that is added up in blocks must not lose what each of them adds."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.rand(2048, 4, generator=random).bfloat16().requires_grad_()
    weight = torch.zeros(6, 4, dtype=torch.bfloat16).requires_grad_()
    tokens = torch.zeros(2048, dtype=torch.int64)
    projected(hidden, weight, tokens, block=(16, 6), entropy=False)[0].sum().backward()
    assert weight.grad is not None
    expected = hidden.detach().double().sum(0) * (5 / 6)
    assert_close(weight.grad[0] / expected, torch.ones(4), tol=5e-3)


def test_shapes_and_temperature_are_checked() -> None:
    hidden, weight, _, tokens = case()
    with pytest.raises(ValueError, match=r"\[N, H\]"):
        projected(hidden, weight[:, :5], tokens)
    with pytest.raises(ValueError, match="temperature=0"):
        projected(hidden, weight, tokens, temperature=0)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_most_likely_tokens_are_told(block: tuple[int, int] | None) -> None:
    hidden, weight, _, tokens = case()
    best = (hidden @ weight.T).argmax(dim=-1)
    tokens[::2] = best[::2]
    top1 = projection.projected_predictions(hidden, weight, tokens, block=block, entropy=False)[2]
    assert top1.tolist() == (tokens == best).tolist() and top1[::2].all() and not top1.all()
