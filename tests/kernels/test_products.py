"""Matrix products by oneDNN: the numbers of torch's own, forward and backward."""

import pytest
import torch
from torch.nn.functional import linear as torch_linear

from trl.kernels import products
from trl.kernels.products import bucket_size, can_be_packed, linear, packed, packed_linear, summed_outer

pytestmark = pytest.mark.kernel

needs_onednn = pytest.mark.skipif(not products._has_onednn(), reason="torch was built without oneDNN's linear layers")


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that MKL is slow on, for products of any size."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_WORTHWHILE", 0)


def near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).norm() / want.norm()
    assert error < 4 * torch.finfo(dtype).eps, error


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inside", "outside"), [((3, 7), 5, 33), ((1,), 64, 1), ((2, 300), 40, 9)])
def test_linear_and_its_gradients(
    rows: tuple[int, ...], inside: int, outside: int, bias: bool, transposed: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*rows, inside, requires_grad=True)
    w = torch.randn((inside, outside) if transposed else (outside, inside), requires_grad=True)
    b = torch.randn(outside, requires_grad=True) if bias else None
    inputs = [x, w] + ([] if b is None else [b])
    got = linear(x, w, b, transposed=transposed)
    assert type(got.grad_fn).__name__ == "_LinearBackward"
    wide = w.double().t() if transposed else w.double()
    want = torch_linear(x.double(), wide, None if b is None else b.double())
    near(got, want)
    # Not contiguous, as the gradient of a part of a larger output is.
    outer = torch.randn(*rows, outside + 3)[..., 1:-2]
    found = torch.autograd.grad(got, inputs, outer)
    for mine, theirs, leaf in zip(found, torch.autograd.grad(want, inputs, outer.double()), inputs, strict=True):
        near(mine, theirs.double())
        assert mine.shape == leaf.shape


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
def test_rows_that_do_not_lie_together() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 4, 20).transpose(0, 1), torch.randn(20, 30).t()
    near(linear(x, w), torch_linear(x.double(), w.double()))


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
def test_only_the_gradients_that_are_asked_for() -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, w).sum().backward()
    near(w.grad, x.double().sum(dim=0).expand(6, 8))  # type: ignore[arg-type]
    x.requires_grad_()
    w = w.detach()
    linear(x, w).sum().backward()
    near(x.grad, w.double().sum(dim=0).expand(4, 8))  # type: ignore[arg-type]


@needs_onednn
@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize(("count", "p", "q"), [(5, 3, 40), (400, 60, 8), (400, 8, 60), (1, 2, 2)])
def test_summed_outer(count: int, p: int, q: int) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(count, p), torch.randn(count, q)
    got = summed_outer(first, second)
    near(got, first.double().t() @ second.double())
    assert got.is_contiguous()


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (torch.zeros(0, 8), torch.zeros(4, 8)),
        (torch.zeros(2, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)),
        (torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(4, 8, dtype=torch.bfloat16)),
    ],
)
@pytest.mark.usefixtures("by_onednn")
def test_the_rest_is_torch_s_own(rows: torch.Tensor, weight: torch.Tensor) -> None:
    weight.requires_grad_()
    got = linear(rows, weight)
    assert type(got.grad_fn).__name__ != "_LinearBackward"
    assert got.shape == (len(rows), 4)


@pytest.mark.usefixtures("by_onednn")
def test_a_subclass_of_tensor_is_torch_s_own() -> None:
    class Sharded(torch.Tensor):
        pass

    weight = torch.zeros(70, 80).as_subclass(Sharded).requires_grad_()
    assert type(linear(torch.zeros(2, 80), weight).grad_fn).__name__ != "_LinearBackward"
    assert not can_be_packed(weight)


def test_autocast_decides_for_itself(by_onednn: None) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.zeros(2, 8), torch.zeros(4, 8)).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_packed_weights(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(rows, 1, 96).to(dtype), torch.randn(64, 96).to(dtype), torch.randn(64).to(dtype)
    if not can_be_packed(w):
        pytest.skip("this processor has no bfloat16 instructions")
    near(packed_linear(x, packed(w, 16), b), torch_linear(x.double(), w.double(), b.double()), dtype)
    turned = torch.randn(96, 64).to(dtype).t()
    near(packed_linear(x, packed(turned, 16), None), torch_linear(x.double(), turned.double()), dtype)


@pytest.mark.parametrize("shape", [(63, 200), (200, 63)])
def test_small_weights_are_not_packed(shape: tuple[int, int]) -> None:
    assert not can_be_packed(torch.zeros(shape))
    assert not can_be_packed(torch.zeros(200, 200, dtype=torch.float64))


def test_bucket_sizes_are_few_and_near() -> None:
    sizes = [bucket_size(count) for count in range(2000)]
    assert sizes[:33] == list(range(33))
    assert all(count <= size <= count * 17 / 16 for count, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert all(bucket_size(size) == size for size in sizes)
    assert len(set(sizes[1024:])) <= 17
    assert {bucket_size(count, steps=4) for count in range(33, 65)} == {40, 48, 56, 64}
