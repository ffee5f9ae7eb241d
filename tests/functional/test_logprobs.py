from __future__ import annotations

import math
from operator import itemgetter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.functional import oracles
from tests.functional.oracles import f64, randn, softmax
from tests.helpers import assert_close
from trl.functional import entropy, token_logprobs, token_logprobs_and_entropy

LOG = math.log
LOGITS = torch.tensor([LOG(0.5), LOG(0.25), LOG(0.25)])


def test_worked_by_hand() -> None:
    for token, p in enumerate((0.5, 0.25, 0.25)):
        assert_close(token_logprobs(LOGITS, torch.tensor(token)), LOG(p))
    assert_close(entropy(LOGITS), 1.5 * LOG(2))


def test_temperature_worked_by_hand() -> None:
    # At 1/2 the odds are squared: 4 : 1 : 1; at 2 they are square roots: sqrt(2) : 1 : 1.
    assert_close(token_logprobs(LOGITS, torch.tensor(0), temperature=0.5), LOG(4 / 6))
    assert_close(entropy(LOGITS, temperature=0.5), -(4 / 6) * LOG(4 / 6) - (2 / 6) * LOG(1 / 6))
    root = math.sqrt(2)
    assert_close(token_logprobs(LOGITS, torch.tensor(1), temperature=2.0), -LOG(root + 2))


def test_uniform_and_certain() -> None:
    assert_close(entropy(torch.zeros(7)), LOG(7))
    assert_close(token_logprobs(torch.zeros(7), torch.tensor(3)), -LOG(7))
    certain = torch.tensor([0.0, -math.inf, -math.inf])
    assert_close(token_logprobs(certain, torch.tensor(0)), 0.0)
    assert_close(entropy(certain), 0.0)
    assert float(token_logprobs(certain, torch.tensor(1))) == -math.inf


def test_a_word_ruled_out_has_no_part_in_entropy_or_gradient() -> None:
    logits = torch.tensor([LOG(3.0), 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    logprob, spread = token_logprobs_and_entropy(logits, torch.tensor(0))
    expected = -0.75 * LOG(0.75) - 0.25 * LOG(0.25)
    assert_close(spread, expected)
    (slope,) = torch.autograd.grad(logprob, logits, retain_graph=True)
    assert_close(slope, [0.25, -0.25, 0.0])
    (slope,) = torch.autograd.grad(spread, logits)  # dH / dx_i = -p_i (log p_i + H)
    assert_close(slope, [-0.75 * (LOG(0.75) + expected), -0.25 * (LOG(0.25) + expected), 0.0])


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 6),
    st.integers(0, 1000),
    st.floats(0.2, 5.0),
    st.integers(1, 9),
)
def test_any_shape_against_plain_python(
    shape: list[int], vocabulary: int, seed: int, temperature: float, chunk_rows: int
) -> None:
    logits = 4 * randn(*shape, vocabulary, seed=seed)
    tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    logprobs, spread = token_logprobs_and_entropy(logits, tokens, temperature=temperature, chunk_rows=chunk_rows)
    assert logprobs.shape == spread.shape == tuple(shape)
    rows = logits.reshape(-1, vocabulary).tolist()
    expected = [LOG(softmax(row, temperature)[token]) for row, token in zip(rows, tokens.reshape(-1).tolist())]
    assert_close(logprobs.reshape(-1), f64(expected), tol=1e-11)
    expected = [oracles.entropy(row, temperature) for row in rows]
    assert_close(spread.reshape(-1), f64(expected), tol=1e-11)
    alone = token_logprobs(logits, tokens, temperature=temperature, chunk_rows=chunk_rows)
    assert torch.equal(alone, logprobs)
    assert torch.equal(entropy(logits, temperature=temperature, chunk_rows=chunk_rows), spread)


def test_without_entropy_zeros_stand_in_its_place() -> None:
    logits = randn(2, 3, seed=0).requires_grad_()
    logprobs, spread = token_logprobs_and_entropy(logits, torch.tensor([0, 1]), entropy=False)
    assert logprobs.requires_grad and not spread.requires_grad
    assert_close(spread, [0.0, 0.0])


@pytest.mark.parametrize("offset", [-130.0, 1000.0])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    """GPT-2's logits stand near -100. Oracle: float64 on the very same float32 logits."""
    logits = 5 * randn(40, 30, seed=3, dtype=torch.float32) + offset
    tokens = logits.argmax(dim=-1)
    logprobs, spread = token_logprobs_and_entropy(logits, tokens)
    rows = logits.double().tolist()
    assert_close(logprobs, [LOG(softmax(row)[token]) for row, token in zip(rows, tokens.tolist())], tol=3e-6)
    assert_close(spread, [oracles.entropy(row) for row in rows], tol=3e-6)


@pytest.mark.parametrize("offset", [0.0, -130.0, 1000.0])
def test_entropy_is_never_negative(offset: float) -> None:
    logits = 40 * randn(500, 30, seed=4, dtype=torch.float32) + offset  # almost certain of one word
    assert float(entropy(logits).min()) >= 0.0
    assert float(token_logprobs(logits, logits.argmax(dim=-1)).max()) <= 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (4 * randn(6, 50, seed=1)).to(dtype).requires_grad_()
    tokens = torch.arange(6)
    logprobs, spread = token_logprobs_and_entropy(logits, tokens, temperature=0.8)
    assert logprobs.dtype == spread.dtype == torch.float32
    rows = logits.detach().double().tolist()
    assert_close(logprobs, [LOG(softmax(row, 0.8)[i]) for i, row in enumerate(rows)])
    assert_close(spread, [oracles.entropy(row, 0.8) for row in rows])
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 100])
def test_gradients_match_finite_differences(temperature: float, chunk_rows: int) -> None:
    logits = randn(2, 3, 5, seed=2).requires_grad_()
    tokens = torch.tensor([[0, 4, 2], [2, 2, 1]])
    settings = dict(temperature=temperature, chunk_rows=chunk_rows)
    assert torch.autograd.gradcheck(lambda x: token_logprobs_and_entropy(x, tokens, **settings), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, **settings), (logits,))
    assert torch.autograd.gradcheck(lambda x: entropy(x, **settings), (logits,))
    # Either output alone, of a call that computes both.
    for output in (itemgetter(0), itemgetter(1)):
        assert torch.autograd.gradcheck(
            lambda x, output=output: output(token_logprobs_and_entropy(x, tokens, **settings)), (logits,)
        )


def test_gradient_worked_by_hand() -> None:
    """d log p_a / d logits is onehot(a) - p, divided by the temperature."""
    logits = LOGITS.double().requires_grad_()
    token_logprobs(logits, torch.tensor(1)).backward()
    assert_close(logits.grad, [-0.5, 0.75, -0.25])
    logits = LOGITS.double().requires_grad_()
    token_logprobs(logits, torch.tensor(0), temperature=0.5).backward()
    assert_close(logits.grad, [2 * (1 - 4 / 6), -2 / 6, -2 / 6])


def test_no_gradient_asked_for_none_given() -> None:
    class Wall(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            return None

    logits = LOGITS.double().requires_grad_()
    wall = Wall.apply(token_logprobs(logits, torch.tensor(1)))
    (slope,) = torch.autograd.grad(wall, logits, allow_unused=True)
    assert slope is None or float(slope.abs().sum()) == 0.0


def test_logits_that_are_a_strided_view() -> None:
    whole = randn(5, 3, 4, seed=9)
    logits = whole.transpose(0, 1)[:, 1:]  # [3, 4, 4], as a shifted slice of a model's output is
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    expected = [[LOG(softmax(row.tolist())[0]) for row in block] for block in logits]
    assert_close(token_logprobs(logits, tokens, chunk_rows=3), f64(expected), tol=1e-12)


def test_no_rows_at_all() -> None:
    logits = torch.zeros(0, 3, 5, requires_grad=True)
    logprobs, spread = token_logprobs_and_entropy(logits, torch.zeros(0, 3, dtype=torch.int64))
    assert logprobs.shape == spread.shape == (0, 3)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 3, 5)


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 8)])
def test_a_poisoned_row_stays_in_its_row(rows: slice) -> None:
    logits = randn(8, 5, seed=11)
    hurt = logits.clone()
    hurt[rows] = float("nan")
    healthy = torch.ones(8, dtype=torch.bool)
    healthy[rows] = False
    tokens = torch.arange(8) % 5
    for clean, dirty in zip(
        token_logprobs_and_entropy(logits, tokens, chunk_rows=3),
        token_logprobs_and_entropy(hurt, tokens, chunk_rows=3),
    ):
        assert torch.equal(clean[healthy], dirty[healthy])
        assert bool(dirty[~healthy].isnan().all())


class _Births(TorchDispatchMode):
    """The largest float32 tensor that came into being."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.largest = max(self.largest, x.numel())
        return result


def test_no_float32_copy_of_the_logits_is_ever_born() -> None:
    logits = torch.zeros(64, 100, dtype=torch.bfloat16, requires_grad=True)
    with _Births() as births:
        logprobs, spread = token_logprobs_and_entropy(logits, torch.zeros(64, dtype=torch.int64), chunk_rows=4)
        (logprobs.sum() + spread.sum()).backward()
    assert births.largest == 4 * 100


def test_bad_input_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*\(2, 4\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            token_logprobs(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), temperature=temperature)
