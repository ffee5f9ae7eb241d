"""What processes have to tell each other. Collective calls stand in this room alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def sum_over_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """The sum of `tensor`, of one shape everywhere, over all processes. Every process must call this."""
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor


@contextmanager
def whole_gradients(accelerator: Any) -> Iterator[None]:
    """Within, accelerate neither divides losses nor drops optimizer and scheduler steps.

    How many passes it accumulates over, and whether a step is due, is one state of the whole process: a launcher's
    `--gradient_accumulation_steps` sets it, and so does any other `Accelerator`, such as that of a reward model's training.
    """
    due, passes = accelerator.sync_gradients, accelerator.gradient_accumulation_steps
    accelerator.sync_gradients, accelerator.gradient_accumulation_steps = True, 1
    try:
        yield
    finally:
        accelerator.sync_gradients, accelerator.gradient_accumulation_steps = due, passes


def share_bytes(accelerator: Any, data: bytes) -> list[bytes]:
    """What every process gave, in the order of their ranks. Every process must call this; nothing is pickled."""
    if accelerator.num_processes == 1:
        return [data]
    device = accelerator.device
    sizes = accelerator.gather(torch.tensor([len(data)], device=device)).tolist()
    padded = torch.zeros(1, max(1, *sizes), dtype=torch.uint8, device=device)
    if data:
        padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    rows = accelerator.gather(padded).cpu()
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]


def run_together(accelerator: Any, work: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
    """Runs `work` on every process; if it fails on one, it fails on all, and nobody waits for the one that left.

    Every process must call this.

    Args:
        accelerator: of all processes.
        work: must not make collective calls.
        error: what is raised on the processes on which `work` did not fail.
    """
    failure: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except BaseException as caught:  # raised below, after the others have heard of it
        failure = caught
    said = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()
    for rank, words in enumerate(share_bytes(accelerator, said)):
        if words and failure is None:
            raise error(f"process {rank} failed with {words.decode()}")
    if failure is not None:
        raise failure
    return result
