"""Matrix products of linear layers on this machine: torch's own, and by oneDNN on weights as they are or packed; and what a
product of a new shape costs.

    python bench/products.py

Every product takes the next of many weights, as layers do, so that none of them waits in a cache. Medians; shapes are those of
a small Llama (576 wide, 1536 inside) and of the embedded GPT-2 (160 wide).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl.kernels import products
from trl.kernels.allocator import keep_freed_memory
from trl.kernels.products import can_be_packed, packed, packed_linear, processor

# Rows, columns that are read, columns that are made.
SHAPES = [(16, 576, 1536), (64, 576, 1536), (224, 576, 1536), (16, 160, 640), (64, 160, 640), (768, 160, 640)]
BYTES = 200 * 2**20  # of all weights together


def teraflops(run: Callable[[Tensor], Any], weights: list[Tensor], operations: int) -> float:
    """Of going through all the weights, in 1e12 operations a second."""
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        for weight in weights:
            run(weight)
        seconds.append(time.perf_counter() - started)
    return operations * len(weights) / statistics.median(seconds) / 1e12


def resident_mb() -> float:
    """Memory of this process at the moment; nan where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), math.nan)


def new_shapes(dtype: torch.dtype) -> tuple[float, float, float]:
    """Milliseconds of a product by oneDNN whose number of rows is new, and of the same one again, and MB that each keeps."""
    weight, counts = torch.randn(640, 160).to(dtype), range(400, 600)
    inputs = [torch.randn(count, 160).to(dtype) for count in counts]
    before, seconds = resident_mb(), []
    for _ in range(2):
        started = time.perf_counter()
        for x in inputs:
            products._onednn(x, weight, None)
        seconds.append((time.perf_counter() - started) / len(counts))
    return 1e3 * seconds[0], 1e3 * seconds[1], (resident_mb() - before) / len(counts)


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    # Before anything else has left memory that could be used again.
    kinds = [kind for kind in (torch.float32, torch.bfloat16) if can_be_packed(torch.zeros(640, 160, dtype=kind))]
    with torch.no_grad():
        of_new_shapes = {kind: new_shapes(kind) for kind in kinds}
    print(f"{processor().get('cpu_name')}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| dtype | rows | in | out | torch's, TFLOP/s | oneDNN | oneDNN, packed | packed is |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for rows, inside, outside in SHAPES:
            size = inside * outside * torch.finfo(dtype).bits // 8
            weights = [torch.randn(outside, inside).to(dtype) for _ in range(max(1, BYTES // size))]
            if not can_be_packed(weights[0]):
                continue
            x = torch.randn(rows, inside).to(dtype)
            work = 2 * rows * inside * outside
            with torch.no_grad():
                plain = teraflops(lambda w, x=x: torch.nn.functional.linear(x, w), weights, work)
                other = teraflops(lambda w, x=x: products._onednn(x, w, None), weights, work)
                laid_out = [packed(weight, rows) for weight in weights]
                quick = teraflops(lambda w, x=x: packed_linear(x, w, None), laid_out, work)
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {name} | {rows} | {inside} | {outside} | {plain:.2f} | {other:.2f} | {quick:.2f} | {quick / plain:.1f}× |",
                flush=True,
            )

    print("\n| dtype | first product of a shape, ms | the same again, ms | kept for each shape, MB |")
    print("| --- | --- | --- | --- |")
    for dtype, (first, again, kept) in of_new_shapes.items():
        print(f"| {str(dtype).removeprefix('torch.')} | {first:.2f} | {again:.2f} | {kept:.2f} |", flush=True)


if __name__ == "__main__":
    main()
