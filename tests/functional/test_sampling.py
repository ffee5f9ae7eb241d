"""Drawing tokens: against exact probabilities, by the chi-square test; and the cuts, by hand and against transformers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import assert_close
from trl.functional.sampling import _sum_by_products, cut_logits, draw

INF = math.inf


def chi_square_limit(freedom: int) -> float:
    """What a chi-square variable exceeds about once in 30,000 times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.0 * math.sqrt(spread)) ** 3


def chi_square(logits: Tensor, count: int, seed: int) -> tuple[float, int]:
    """Statistic and degrees of freedom of `count` draws from softmax(logits [V]); rare words are counted together."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(count, dtype=torch.float64, generator=generator)
    words, _ = draw(logits.expand(count, -1), uniforms)
    expected = logits.double().softmax(-1) * count
    seen = torch.bincount(words, minlength=len(logits)).double()
    assert (seen[expected == 0] == 0).all()
    common = expected >= 5
    pairs = [(seen[common], expected[common]), (seen[~common].sum()[None], expected[~common].sum()[None])]
    parts = [((s - e) ** 2 / e)[e > 0] for s, e in pairs]
    return float(sum(p.sum() for p in parts)), sum(len(p) for p in parts) - 1


CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 50},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"top_k": 300, "top_p": 0.8, "min_p": 0.01},
]


@pytest.mark.conformance
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(cut) or "plain")
@pytest.mark.parametrize("words", [64, 512, 1500])
def test_draws_follow_the_exact_distribution(cut: dict[str, Any], words: int) -> None:
    logits = 2.5 * torch.randn(words, generator=torch.Generator().manual_seed(words))
    statistic, freedom = chi_square(cut_logits(logits, **cut), 40_000, seed=words)
    assert statistic < chi_square_limit(freedom)


def test_the_chi_square_test_can_fail() -> None:
    logits = torch.zeros(100)
    skewed = logits.clone()
    skewed[:50] += 0.2
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(draw(skewed.expand(40_000, -1), uniforms)[0], minlength=100).double()
    assert float(((seen - 400) ** 2 / 400).sum()) > chi_square_limit(99)


def test_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log().expand(5, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.999], dtype=torch.float64)
    words, logprobs = draw(logits, uniforms)
    assert words.tolist() == [0, 0, 1, 1, 3]
    assert_close(logprobs, [math.log(0.5), math.log(0.5), math.log(0.25), math.log(0.25), math.log(0.25)])


@pytest.mark.parametrize("words", [1, 3, 511, 512, 513, 1024])
def test_a_word_of_probability_zero_is_never_drawn(words: int) -> None:
    """Not at either end of the numbers either, where rounding could reach over an edge."""
    ends = torch.tensor([0.0, 5e-324, 0.5, 1 - 2**-53], dtype=torch.float64)
    for only in {0, words // 2, words - 1}:
        logits = torch.full((4, words), -INF)
        logits[:, only] = -3.0
        drawn, logprobs = draw(logits, ends)
        assert drawn.tolist() == [only] * 4
        assert_close(logprobs, torch.zeros(4))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1200), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True), st.floats(0.1, 30))
def test_the_word_is_where_the_cumulative_sum_passes_the_number(
    words: int, seed: int, uniform: float, scale: float
) -> None:
    logits = scale * torch.randn(1, words, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (word,), (logprob,) = draw(logits, torch.tensor([uniform], dtype=torch.float64))
    p = logits[0].softmax(-1)
    below, above = float(p[: int(word)].sum()), float(p[: int(word) + 1].sum())
    assert below - 1e-9 <= uniform <= above + 1e-9
    assert_close(logprob, p[int(word)].log(), 1e-9)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together = draw(logits, uniforms)[0].tolist()
    assert together == [int(draw(row[None], u[None])[0]) for row, u in zip(logits, uniforms, strict=True)]


def test_cuts_by_hand() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert torch.isfinite(cut_logits(logits, top_k=2)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(cut_logits(logits, top_p=0.69)).tolist() == [[True, True, False, False]]
    # The smallest set that reaches top_p: of probabilities 1/2, 1/4, 1/4 a half is reached by one word, three quarters by two.
    halves = torch.tensor([[0.0, -1.0, -1.0, -INF]], dtype=torch.float64) * math.log(2)
    assert torch.isfinite(cut_logits(halves, top_p=0.5)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(cut_logits(halves, top_p=0.5 + 1e-9)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(cut_logits(logits, top_p=0.71)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(cut_logits(logits, min_p=0.5)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(cut_logits(logits, top_p=1e-9)).tolist() == [[True, False, False, False]]
    assert cut_logits(logits) is logits


def test_words_of_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(cut_logits(logits, top_k=2)).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("cut", CUTS[1:], ids=lambda cut: "-".join(cut))
@pytest.mark.parametrize("words", [64, 3000])
def test_cuts_are_those_of_transformers(cut: dict[str, Any], words: int) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(5, words, generator=torch.Generator().manual_seed(words))
    logits[0] *= 0.01  # nearly uniform: a nucleus beyond the head
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    expected = logits
    for name, value in cut.items():
        expected = warpers[name](value)(None, expected)
    assert torch.equal(torch.isfinite(cut_logits(logits, **cut)), torch.isfinite(expected))


@pytest.mark.parametrize(
    ("cut", "named"), [({"top_k": -1}, "top_k=-1"), ({"top_p": 0.0}, "top_p=0.0"), ({"min_p": 1.5}, "min_p=1.5")]
)
def test_settings_out_of_range(cut: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cut_logits(torch.zeros(1, 3), **cut)


@pytest.mark.parametrize("count", [1, 5, 512, 513, 300_000])
def test_a_running_sum_by_products_is_a_running_sum(count: int) -> None:
    """What draws use on a GPU in torch's deterministic mode."""
    x = torch.rand(3, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(_sum_by_products(x), x.cumsum(dim=-1), rtol=1e-12, atol=0)
