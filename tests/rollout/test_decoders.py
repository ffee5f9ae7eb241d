"""What a decoder feeds a model, and the cache that it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.zoo import ZOO
from tests.rollout.test_local import QUERIES, numbers
from trl.kernels.kv_cache import GrowingLayer, growing_cache
from trl.rollout import decoders, sample
from trl.types import Sampling


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    layer, kept = GrowingLayer(), []
    generator = torch.Generator().manual_seed(0)
    for n in (3, 1, 70, 1, 200, 1):
        keys, values = (torch.randn(4, 2, n, 8, generator=generator) for _ in range(2))
        kept.append((keys, values))
        seen = layer.update(keys, values)
        for got, parts in zip(seen, zip(*kept, strict=True), strict=True):
            assert torch.equal(got, torch.cat(parts, dim=2))
    layer.batch_select_indices(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, torch.cat([k for k, _ in kept], dim=2)[[2, 0, 0]])
    assert layer.get_seq_length() == 276


@pytest.mark.kernel
def test_layers_with_a_window_stay_what_they_are() -> None:
    (mistral,) = (a for a in ZOO if a.name == "Mistral")
    assert not any(isinstance(layer, GrowingLayer) for layer in growing_cache(mistral.build().config).layers)
    assert all(isinstance(layer, GrowingLayer) for layer in growing_cache(tiny_gpt2().config).layers)


def test_a_query_that_stands_there_twice_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = decoders.CausalDecoder._forward

    def counted(self: Any, tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        return forward(self, tokens)

    monkeypatch.setattr(decoders.CausalDecoder, "_forward", counted)
    sample(tiny_gpt2(), QUERIES, sampling=Sampling(), limits=[3] * 5, uniforms=numbers(3, 5))
    assert rows == [4, 5, 5]


def test_the_projection_is_given_rows_that_lie_together() -> None:
    """torch multiplies each row of a slice with a copy of the weights: 16 queries would take 16 times the projection."""
    model = tiny_llama()
    together: list[bool] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: together.append(args[0].is_contiguous()))
    queries = [torch.tensor([3, 4, 5 + i]) for i in range(4)]
    sample(model, queries, sampling=Sampling(), limits=[2] * 4, uniforms=numbers(2, 4))
    assert together == [True, True]
