"""Time and memory of log-probabilities and entropies with and without logits, forward and backward, on Linux.

    python bench/projection.py

2,048 tokens of SmolLM2's vocabulary (576 wide, 49,152 words); the least CPU time of four, and the peak over what was
resident before.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trl.functional.logprobs import token_logprobs_and_entropy
from trl.kernels.projection import projected_logprobs_and_entropy

TOKENS, WIDTH, WORDS = 2048, 576, 49152


def resident_mb(name: str) -> float:
    """`VmRSS`, at the moment, or `VmHWM`, the peak."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def measured(logprobs: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor]) -> tuple[float, float]:
    """CPU seconds and peak MB."""
    seconds = []
    base = 0.0
    for i in range(5):
        for leaf in leaves:
            leaf.grad = None
        if i == 1:  # the first warms up
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            base = resident_mb("VmRSS")
        started = time.process_time()
        sum(x.sum() for x in logprobs()).backward()
        seconds.append(time.process_time() - started)
    return min(seconds[1:]), resident_mb("VmHWM") - base


def main() -> None:
    torch.manual_seed(0)
    print("| dtype | logits | CPU, s | memory, MB |\n| --- | --- | --- | --- |")
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
        weight = torch.randn(WORDS, WIDTH).div_(WIDTH**0.5).to(dtype).requires_grad_()
        tokens = torch.randint(WORDS, (TOKENS,))
        for name, run in (
            ("in blocks", lambda h=hidden, w=weight, t=tokens: projected_logprobs_and_entropy(h, w, t)),
            ("at once", lambda h=hidden, w=weight, t=tokens: token_logprobs_and_entropy(h @ w.t(), t, entropy=True)),
        ):
            seconds, memory = measured(run, [hidden, weight])
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
