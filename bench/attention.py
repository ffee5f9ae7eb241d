"""Milliseconds of attention on this machine: ours against torch's, in a microbatch and for one new token; and of the cache.

    python bench/attention.py

Shapes are those of a small Llama (9 heads of 64, 3 of keys); medians, in bfloat16 and float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from trl.kernels.allocator import keep_freed_memory
from trl.kernels.decode_attention import decoding_attention
from trl.kernels.kv_cache import GrowingLayer
from trl.kernels.packed_attention import packed, packed_attention

HEADS, SHARED, SIZE = 9, 3, 64


class Layer:
    training = False
    is_causal = True
    num_key_value_groups = HEADS // SHARED


class Config:
    _attn_implementation = "sdpa"


def milliseconds(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(15):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def update(count: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """Forward and backward of `count` sequences of one length."""
    total = count * length
    row = [torch.randn(1, n, total, SIZE, dtype=dtype, requires_grad=True) for n in (HEADS, SHARED, SHARED)]

    def ours() -> None:
        with packed(Config(), [length] * count):
            out = packed_attention(Layer(), *row, None)[0]
        out.backward(torch.ones_like(out))

    def theirs() -> None:
        parts = [x.view(-1, count, length, SIZE).transpose(0, 1) for x in row]
        k, v = (x.repeat_interleave(HEADS // SHARED, 1) for x in parts[1:])
        out = F.scaled_dot_product_attention(parts[0], k, v, is_causal=True)
        out.backward(torch.ones_like(out))

    return milliseconds(ours), milliseconds(theirs)


@torch.no_grad()
def decode(count: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """One new token of `count` sequences."""
    query = torch.randn(count, HEADS, 1, SIZE, dtype=dtype)
    key, value = (torch.randn(count, SHARED, length + 40, SIZE, dtype=dtype)[:, :, :length] for _ in range(2))

    def theirs() -> None:
        k, v = (x.repeat_interleave(HEADS // SHARED, 1) for x in (key, value))
        F.scaled_dot_product_attention(query, k, v)

    return milliseconds(lambda: decoding_attention(Layer(), query, key, value, None)), milliseconds(theirs)


def cache(count: int, length: int, dtype: torch.dtype) -> tuple[float, float]:
    """Appending keys and values of one token, of `length` that `count` sequences write after 8."""
    query, token = (torch.zeros(count, SHARED, tokens, SIZE, dtype=dtype) for tokens in (8, 1))

    def append(kind: type[DynamicLayer]) -> None:
        layer = kind()
        for states in (query, *[token] * length):
            layer.update(states, states)

    return tuple(milliseconds(lambda kind=kind: append(kind)) / length for kind in (GrowingLayer, DynamicLayer))


def main() -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    print("| pass | dtype | sequences | tokens | ours, ms | torch's, ms |\n| --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.bfloat16, torch.float32):
        for name, run, shapes in (
            ("update", update, ((4, 56), (4, 136), (4, 264), (1, 1024))),
            ("decode", decode, ((16, 56), (64, 56), (64, 264))),
            ("cache", cache, ((16, 48), (64, 48), (64, 256))),
        ):
            for count, length in shapes:
                ours, theirs = run(count, length, dtype)
                kind = str(dtype).removeprefix("torch.")
                print(f"| {name} | {kind} | {count} | {length} | {ours:.3f} | {theirs:.3f} |", flush=True)


if __name__ == "__main__":
    main()
