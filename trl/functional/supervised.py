"""Losses of supervised fine-tuning, per token."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def nll(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood `[...]` of tokens with log-probabilities `[...]`, in nats."""
    return -logprobs


def dft(logprobs: Tensor) -> Tensor:
    """Dynamic fine-tuning, `-sg(p) log p` `[...]`: the gradient of `-p` (Wu et al. 2025, arXiv:2508.05629, eq. 9)."""
    return -logprobs * logprobs.detach().exp()


TOKEN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}
