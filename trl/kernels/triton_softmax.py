"""Triton kernels of `trl.kernels.projection_on_gpu`, which imports this module where Triton is installed.

Gain and off switch: see there.
"""

from __future__ import annotations

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from trl.functional import logprobs

FLOOR = tl.constexpr(logprobs.FLOOR)
BITS = tl.constexpr(logprobs.BITS)


@triton.jit
def statistics(  # type: ignore[no-untyped-def]
    logits, tokens, top, total, weighted, chosen, start, columns, unit, SIZE: tl.constexpr, ENTROPY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    token = tl.load(tokens + row) - start
    largest = tl.load(top + row)
    mass = tl.load(total + row)
    moment = tl.load(weighted + row)
    for begin in range(0, columns, SIZE):
        at = begin + tl.arange(0, SIZE)
        raw = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(tl.maximum(largest, tl.max(raw, 0)), FLOOR)
        shift = tl.maximum((largest - new) * unit, FLOOR)
        x = (raw - new) * unit
        w = tl.exp2(x)
        scale = tl.exp2(shift)
        if ENTROPY:
            moment = (moment + mass * shift) * scale + tl.sum(w * tl.maximum(x, FLOOR), 0)
        mass = mass * scale + tl.sum(w, 0)
        largest = new
    tl.store(top + row, largest)
    tl.store(total + row, mass)
    if ENTROPY:
        tl.store(weighted + row, moment)
    if (token >= 0) & (token < columns):
        tl.store(chosen + row, tl.load(logits + token).to(tl.float32))


@triton.jit
def gradient(  # type: ignore[no-untyped-def]
    logits,
    out,
    tokens,
    highest,
    entropy,
    of_logprobs,
    of_entropy,
    start,
    columns,
    unit,
    SIZE: tl.constexpr,
    LOGPROBS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < columns
    raw = tl.load(logits + row * columns + at, mask=inside, other=float("-inf")).to(tl.float32)
    x = (raw - tl.load(highest + row)) * unit
    factor = tl.zeros([SIZE], tl.float32)
    if ENTROPY:
        factor += (tl.maximum(x, FLOOR) / BITS + tl.load(entropy + row)) * tl.load(of_entropy + row)
    if LOGPROBS:
        factor += tl.load(of_logprobs + row)
    result = -tl.exp2(x) * factor
    if LOGPROBS:
        token = tl.load(tokens + row) - start
        result += tl.where(at == token, tl.load(of_logprobs + row), 0.0)
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), mask=inside)
