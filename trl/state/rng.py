"""Saves and restores every random generator of a process, as JSON."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators_state(device: torch.device, order_generator: torch.Generator) -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and CUDA, and of `order_generator`.

    Args:
        device: this process's device; only its CUDA generator is saved.
        order_generator: CPU generator of the minibatch order.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [_hex(torch.cuda.get_rng_state(device))] if device.type == "cuda" else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": cuda,
        "minibatch_order": _hex(order_generator.get_state()),
    }


def set_generators(state: Mapping[str, Any], device: torch.device, order_generator: torch.Generator) -> None:
    """Restores every generator from `generators_state`; CUDA's is left alone if its state was not saved."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_tensor(state["cuda"][0]), device)
    order_generator.set_state(_tensor(state["minibatch_order"]))


@contextmanager
def preserved_generators(device: torch.device, order_generator: torch.Generator) -> Iterator[None]:
    """Restores every generator on exit, whatever is drawn or seeded inside the context."""
    state = generators_state(device, order_generator)
    try:
        yield
    finally:
        set_generators(state, device, order_generator)


@contextmanager
def seeded_generators(seed: int, device: torch.device, order_generator: torch.Generator) -> Iterator[None]:
    """Seeds the global generators with `seed` inside the context and restores every generator on exit."""
    with preserved_generators(device, order_generator):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
