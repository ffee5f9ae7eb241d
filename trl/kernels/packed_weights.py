"""Packs weights into oneDNN's layout for decoding, once per batch of responses instead of once per token.

A product with few rows is bound by reading the weights, and torch's own layout reads more slowly (bench/products.py).
A LoRA adapter's A matrix is packed together with its base weight, and decoder layers of supported architectures are
replaced as a whole (`trl.kernels.decode_layers`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.decode_layers import quick_make
from trl.kernels.joined_products import Joined, Part, can_be_joined, part_of
from trl.kernels.products import quicker_products

logger = logging.getLogger(__name__)

# Minimum number of tokens at which copying the weights pays off.
LEAST_TOKENS = 12
# Share of the machine's memory that the copies may take. Of total, not free memory, so that a resumed run makes the
# same choice.
_SHARE = 1 / 8


class _PackedLinear:
    """Replacement for the `forward` of a linear or LoRA layer that uses a packed weight."""

    def __init__(self, part: Part, plain: Callable[..., Tensor], rows: int) -> None:
        self.products = (Joined([part], rows),)
        self.plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].dtype != self.products[0].dtype or not args[0].numel():
            return self.plain(*args, **kwargs)
        return self.products[0](args[0])


@cache
def _memory() -> int | None:
    """Returns this process's share of memory in bytes: the machine's or cgroup's, over local ranks; None if unknown."""
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        return None
    for path in _limits():
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))


def _limits() -> Iterator[Path]:
    """Yields files that may hold a memory limit of this process's cgroups, v2 or v1."""
    root, own = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, names, path = line.split(":", 2)
        folder = Path(path.lstrip("/"))
        if number == "0":
            yield from (root / above / "memory.max" for above in (folder, *folder.parents))
        elif "memory" in names.split(","):
            yield from (root / "memory" / above / "memory.limit_in_bytes" for above in (folder, *folder.parents))


@cache
def _log_too_large(needed: int, memory: int | None) -> None:
    known = "whose size is unknown" if memory is None else f"{memory / 1e9:.1f} GB"
    logger.info(
        "weights are not packed for decoding: copies of %.1f GB are more than an eighth of the memory, %s",
        needed / 1e9,
        known,
    )


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, tokens: int) -> Iterator[None]:
    """Makes the layers of `model` use packed copies of their weights inside the `with` block; not differentiable.

    Does nothing if torch lacks support, for too few tokens, or if the copies would exceed an eighth of the memory.

    Args:
        model: a plain transformers language model, or one with adapters; its weights must not change inside the block.
        rows: approximate number of rows decoded at a time.
        tokens: approximate number of forward passes.
    """
    chosen: dict[Any, Callable[[], Callable[..., Tensor]]] = {}  # module -> factory of its replacement forward
    # MKL multiplies a single float32 row 1.2 to 1.8 times as fast as oneDNN does; from 4 rows on it is the slower one.
    mkl = rows == 1 and next(model.parameters()).dtype == torch.float32 and not quicker_products()
    if (
        not mkl and tokens >= LEAST_TOKENS and not torch.is_autocast_enabled("cpu")
    ):  # autocast would cast the weights in every pass
        chosen = _chosen(model, rows)
    needed = sum(
        part.weight.numel() * part.weight.element_size()
        for module in chosen
        for part in module.modules()
        if type(part) in (nn.Linear, Conv1D)
    )
    memory = _memory()
    if chosen and (memory is None or needed > _SHARE * memory):
        _log_too_large(needed, memory)
        chosen = {}
    before: dict[Any, Any] = {}
    try:
        for module, make in chosen.items():
            forward = make()
            before[module] = vars(module).get("forward")
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _chosen(model: nn.Module, rows: int) -> dict[Any, Callable[[], Callable[..., Tensor]]]:
    """Picks whole decoder layers where supported, else linear layers; returns factories of their forwards."""
    found: dict[Any, Callable[[], Callable[..., Tensor]]] = {}
    within: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if module in within:
            continue
        if (make := quick_make(module)) is not None:
            found[module] = partial(make, module, rows)
        elif (part := part_of(module)) is not None and can_be_joined([part]):
            found[module] = partial(_PackedLinear, part, module.forward, rows)
        elif type(module).__name__ != "ParamWrapper":  # peft's ParamWrapper changes the weight under it in every pass
            continue
        within |= set(module.modules())
    return found
