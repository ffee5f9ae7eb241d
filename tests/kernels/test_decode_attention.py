"""Attention of one new token: what torch's own gives, under every mask that transformers makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close, tiny_gpt2, tiny_llama
from trl.kernels.decode_attention import decoding, decoding_attention
from trl.kernels.kv_cache import GrowingLayer, full_buffer


class Module:
    training = False
    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("new", [1, 4])
def test_numbers(new: int, mask: str) -> None:
    random = torch.Generator().manual_seed(1)
    room = torch.randn(2, 5, 2, 20, 8, generator=random, dtype=torch.float64)
    key, value = room[:, :, :, :11]  # views of a cache with room for more
    query = torch.randn(5, new, 6, 8, generator=random, dtype=torch.float64).transpose(1, 2)
    seen = torch.ones(5, 1, new, 11, dtype=torch.bool)
    seen[1, :, :, :4] = False
    given = {"none": None, "bool": seen, "float": torch.zeros(5, 1, new, 11).double().masked_fill(~seen, -1e30)}[mask]
    expected = F.scaled_dot_product_attention(
        query,
        key.repeat_interleave(3, 1),
        value.repeat_interleave(3, 1),
        attn_mask=given,
        scale=0.3,
        is_causal=mask == "none" and new > 1,
    )
    before = key.clone()
    got, _ = decoding_attention(Module(), query, key, value, given, scaling=0.3)
    assert_close(got, expected.transpose(1, 2), tol=1e-12)
    assert torch.equal(key, before)


@pytest.mark.kernel
def test_models_that_attend_in_their_own_way_are_left_alone() -> None:
    model = tiny_llama()
    with decoding(model):
        assert model.config._attn_implementation == "trl_decoding"
    assert model.config._attn_implementation == "sdpa"
    model = tiny_gpt2()
    model.config._attn_implementation = "eager"
    with decoding(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_bfloat16_reads_the_full_buffer_of_the_cache_and_sees_its_tokens_alone(mask: str) -> None:
    random = torch.Generator().manual_seed(1)
    layer = GrowingLayer()
    states = torch.randn(2, 5, 2, 11, 8, generator=random).bfloat16()
    key, value = layer.update(*states)
    query = torch.randn(5, 6, 1, 8, generator=random).bfloat16()
    assert full_buffer(key).shape[2] > 11
    assert not full_buffer(value)[:, :, 11:].any()
    full_buffer(key)[:, :, 11:] = 1e9  # as though it were of finished rows
    seen = torch.ones(5, 1, 1, 11, dtype=torch.bool)
    seen[1, :, :, :4] = False
    given = {"none": None, "bool": seen, "float": torch.zeros(5, 1, 1, 11).masked_fill(~seen, -1e30).bfloat16()}[mask]
    wide = [part.double().repeat_interleave(3, 1) for part in (key, value)]
    expected = F.scaled_dot_product_attention(
        query.double(), *wide, attn_mask=None if mask == "none" else seen, scale=0.3
    )
    got, _ = decoding_attention(Module(), query, key, value, given, scaling=0.3)
    assert_close(got.double(), expected.transpose(1, 2), tol=2e-2)
