"""Attention within packed sequences: what each gives alone, whatever the blocks, windows, lengths and numbers of heads."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import assert_close, tiny_llama
from trl.kernels import packed_attention as attention
from trl.kernels.packed_attention import Run, packed, packed_attention, packed_mask, runs_of

LENGTHS = [[3, 3, 5, 7], [1, 1, 2], [9], [12, 12, 4]]


class Module:
    training = False
    is_causal = True


def case(lengths: Sequence[int], heads: int = 6, shared: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(lengths))
    return [
        torch.randn(1, n, sum(lengths), 8, generator=random, dtype=dtype).requires_grad_()
        for n in (heads, shared, shared)
    ]


def alone(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """`[1, T, h, D]`: each sequence by torch's own attention under a written-out mask."""
    groups, found, start = query.shape[1] // key.shape[1], [], 0
    for length in lengths:
        part = slice(start, start + length)
        place = torch.arange(length)
        mask = place[:, None] >= place
        if window is not None:
            mask &= place[:, None] - place < window
        k, v = (x[:, :, part].repeat_interleave(groups, 1) for x in (key, value))
        found.append(F.scaled_dot_product_attention(query[:, :, part], k, v, attn_mask=mask, scale=0.3).transpose(1, 2))
        start += length
    return torch.cat(found, dim=1)


def ours(inputs: Sequence[Tensor], lengths: Sequence[int], window: int | None = None, **others: Any) -> Tensor:
    with packed(tiny_llama().config, lengths):
        mask = packed_mask(local_size=window, config=SimpleNamespace(sliding_window=window))
        return packed_attention(Module(), *inputs, mask, scaling=0.3, sliding_window=window, **others)[0]


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("queries", "kept"), [(256, 128), (256, 0), (4, 0), (5, 128), (1, 0)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_numbers_and_gradients(
    lengths: list[int], queries: int, kept: int, window: int | None, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES", queries)
    monkeypatch.setattr(attention, "_SAVED_LENGTH", kept)
    inputs = case(lengths, shared=shared)
    results = []
    for out in (ours(inputs, lengths, window), alone(*inputs, lengths, window)):
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, tol=1e-11)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_a_row_may_go_on_after_its_sequences(dropout: float) -> None:
    inputs = case([3, 3, 5, 7, 4])
    module = Module()
    module.training = True
    with packed(tiny_llama().config, [3, 3, 5, 7]):
        out = packed_attention(module, *inputs, None, scaling=0.3, dropout=dropout)[0]
    assert not out[:, 18:].any()
    before = [x[:, :, :18] for x in inputs]
    for got, want in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(alone(*before, [3, 3, 5, 7], None).square().sum(), before),
        strict=True,
    ):
        assert_close(got[:, :, :18], want, tol=1e-7)
        assert not got[:, :, 18:].any()


def test_nothing_is_kept_of_the_probabilities_of_long_sequences() -> None:
    for length, expected in ((100, True), (300, False)):
        saved: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(tuple(x.shape)) or x, lambda x: x):
            ours(case([length]), [length])
        assert any(length in shape[1:] and shape[-1] == length for shape in saved) == expected


def test_dropout_of_probabilities() -> None:
    inputs, lengths = case([6, 6, 3]), [6, 6, 3]
    module = Module()
    module.training = True
    torch.manual_seed(0)
    with packed(tiny_llama().config, lengths):
        seen = [packed_attention(module, *inputs, None, scaling=0.3, dropout=0.5)[0] for _ in range(2000)]
    assert not torch.equal(seen[0], seen[1])
    assert_close(torch.stack(seen).mean(0), alone(*inputs, lengths, None), tol=0.15)
    assert_close(ours(inputs, lengths, dropout=0.5), alone(*inputs, lengths, None), tol=1e-11)  # not in evaluation mode


@pytest.mark.parametrize("others", [{"softcap": 30.0}, {"s_aux": torch.zeros(6)}, {"is_causal": False}])
def test_what_it_does_not_know_is_refused(others: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError):
        ours(case([4]), [4], **others)
    with packed(tiny_llama().config, [4]), pytest.raises(NotImplementedError, match="mask"):
        packed_attention(Module(), *case([4]), torch.zeros(1, 1, 4, 4))
    with (
        packed(tiny_llama().config, [4]),
        pytest.raises(NotImplementedError, match="sliding_window=2 with a mask whose window is"),
    ):
        packed_attention(Module(), *case([4]), None, sliding_window=2)


@pytest.mark.parametrize(
    "asked",
    [
        {"use_vmap": True},
        {"allow_is_bidirectional_skip": True},
        {"local_size": 3, "config": SimpleNamespace(attention_chunk_size=3)},
        {"local_size": 3, "config": SimpleNamespace(attention_chunk_size=3, sliding_window=3)},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_masks_that_it_does_not_know_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError):
        packed_mask(**asked)


def test_a_window_that_only_the_mask_names_is_kept() -> None:
    """Models may pass none on to their attention, which transformers' own does not look at either."""
    inputs = case([5, 7])
    with packed(tiny_llama().config, [5, 7]):
        got = packed_attention(Module(), *inputs, torch.full((1, 1, 1, 1), 2), scaling=0.3)[0]
    assert_close(got, alone(*inputs, [5, 7], 2), tol=1e-11)


def test_sequences_of_one_length_are_one_run() -> None:
    assert runs_of([2, 2, 3, 3, 3, 2]) == (Run(0, 2, 2), Run(4, 3, 3), Run(13, 1, 2))


def test_an_error_inside_gives_the_model_its_attention_back() -> None:
    config = tiny_llama().config
    before = config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), packed(config, [1]):
        raise RuntimeError("stop")
    assert config._attn_implementation == before
