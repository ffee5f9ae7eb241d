"""Joins the processes of a launch, and wraps the collective calls between them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_ACCELERATE_VARIABLES = {
    "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
}  # set by `accelerate launch` without torchrun


def make_accelerator(**settings: Any) -> Accelerator:
    """Creates an `Accelerator` that spans every process of the launch, also on machines without a GPU.

    Args:
        **settings: arguments of `accelerate.Accelerator`.

    Raises:
        ValueError: if several processes were started or requested but accelerate sees only one.
    """
    on_cpu = not torch.accelerator.is_available()
    device = None if on_cpu else torch.accelerator.current_accelerator()
    if device is not None and device.type == "mps" and "cpu" not in settings:
        logger.warning(
            "training on the CPU: Apple's GPU has no float64, which sampling and statistics use "
            "(PPOConfig(accelerator_kwargs={'cpu': False}) tries it all the same)"
        )
        settings, on_cpu = {"cpu": True} | settings, True
    sizes = ("WORLD_SIZE", *_MPI_SIZES) if on_cpu else ("WORLD_SIZE",)
    started = max(int(os.environ.get(name) or 1) for name in sizes)
    if on_cpu and started > 1:
        settings = {"cpu": True} | settings  # accelerate joins CPU processes only with cpu=True
    accelerator = Accelerator(**settings)
    # Schedulers advance once per `step` call; accelerate's default is once per process at every optimizer step.
    accelerator.step_scheduler_with_optimizer = False
    if accelerator.num_processes > 1:
        return accelerator
    if started > 1:
        raise ValueError(
            f"{started} processes were started but accelerate sees only one: each would train a separate model. Start "
            "them with torchrun; without a GPU, pass cpu=True to any Accelerator or PartialState that your script "
            "creates before the trainer, and either omit 'cpu' from PPOConfig.accelerator_kwargs or set it to True"
        )
    if on_cpu and "WORLD_SIZE" not in os.environ and os.environ.keys() >= {"MASTER_ADDR", *_ACCELERATE_VARIABLES}:
        raise ValueError(
            "accelerate launch was asked for several processes but started only this one (MASTER_ADDR is set, "
            "WORLD_SIZE is not): on CPUs it needs MPI to start more. Use `torchrun --nproc-per-node N script.py` or "
            "`accelerate launch --multi_gpu --num_processes N script.py`, which need no GPU; for one process, unset "
            "MASTER_ADDR"
        )
    return accelerator


def sum_over_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """Sums `tensor` over all processes. Every process must call this with the same shape."""
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor


def gather_over_processes(accelerator: Any, tensor: Tensor) -> Tensor:
    """Concatenates `[B, ...]` tensors of `n` processes to `[n · B, ...]`. Every process must call it, in one shape."""
    return accelerator.gather(tensor) if accelerator.num_processes > 1 else tensor


@contextmanager
def whole_gradients(accelerator: Any) -> Iterator[None]:
    """Turns off accelerate's gradient accumulation: it neither scales losses nor drops optimizer and scheduler steps.

    The accumulation state is global to the process: a launcher's `--gradient_accumulation_steps` sets it, and so does
    any other `Accelerator`, such as the one of a reward model's training.
    """
    before = accelerator.sync_gradients, accelerator.gradient_accumulation_steps
    accelerator.sync_gradients, accelerator.gradient_accumulation_steps = True, 1
    try:
        yield
    finally:
        accelerator.sync_gradients, accelerator.gradient_accumulation_steps = before


def share_bytes(accelerator: Any, data: bytes) -> list[bytes]:
    """Gathers every process's `data`, in rank order, without pickling. Every process must call this."""
    if accelerator.num_processes == 1:
        return [data]
    device = accelerator.device
    sizes = accelerator.gather(torch.tensor([len(data)], device=device)).tolist()
    padded = torch.zeros(1, max(1, *sizes), dtype=torch.uint8, device=device)
    if data:
        padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    rows = accelerator.gather(padded).cpu()
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=True)]


def share_json(accelerator: Any, value: Any) -> list[Any]:
    """Gathers every process's `value` as JSON, in rank order. Every process must call this."""
    return [json.loads(data) for data in share_bytes(accelerator, json.dumps(value).encode())]


def check_same(accelerator: Any, settings: Mapping[str, Any]) -> None:
    """Rejects settings (JSON by name) that differ between processes. Every process must call this.

    Raises:
        ValueError: on every process, naming each difference.
    """
    main, *others = share_json(accelerator, dict(settings))
    differing = [
        f"{name} is {main.get(name)} on process 0 and {value} on process {rank}"
        for rank, other in enumerate(others, start=1)
        for name, value in other.items()
        if value != main.get(name)
    ]
    if differing:
        raise ValueError(f"settings must be the same on every process: {'; '.join(differing)}")


def run_together(accelerator: Any, work: Callable[[], T], error: type[Exception] = RuntimeError) -> T:
    """Runs `work` on every process and raises on all if it fails on one, so that none hangs waiting for another.

    Every process must call this.

    Args:
        accelerator: spans all processes.
        work: must not make collective calls.
        error: exception type to raise on processes where `work` succeeded.

    Returns:
        The result of `work` on this process.
    """
    failure: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except BaseException as caught:  # raised below, after the other processes know
        failure = caught
    message = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()
    for rank, other in enumerate(share_bytes(accelerator, message)):
        if other and failure is None:
            raise error(f"process {rank} failed with {other.decode()}")
    if failure is not None:
        raise failure
    return result
