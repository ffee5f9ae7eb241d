"""Every random number generator of a process, as JSON."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators_state(device: torch.device, own: torch.Generator) -> dict[str, Any]:
    """Python's, NumPy's and torch's generators, those of CUDA, and `own`, the order of minibatches.

    Args:
        device: the process's; of several CUDA devices, only this one's generator is the process's.
        own: a generator on the CPU.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = [_hex(torch.cuda.get_rng_state(device))] if device.type == "cuda" else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _hex(torch.get_rng_state()),
        "cuda": cuda,
        "minibatch_order": _hex(own.get_state()),
    }


def set_generators(state: Mapping[str, Any], device: torch.device, own: torch.Generator) -> None:
    """Puts every generator where `generators_state` found it; CUDA's stays as it is where there was none."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_tensor(state["cuda"][0]), device)
    own.set_state(_tensor(state["minibatch_order"]))


@contextmanager
def kept_generators(device: torch.device, own: torch.Generator) -> Iterator[None]:
    """Whatever is drawn, seeded or restored inside: afterwards every generator is where it was."""
    state = generators_state(device, own)
    try:
        yield
    finally:
        set_generators(state, device, own)


@contextmanager
def own_numbers(seed: int, device: torch.device, own: torch.Generator) -> Iterator[None]:
    """The random numbers of `seed` inside, the same each time; outside, as if none had been drawn."""
    with kept_generators(device, own):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield


def _hex(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).clone()
