"""Checks of a model's logits against reference logits: tokens to try, the error, and what rounding may cause."""

from __future__ import annotations

import torch
from torch import Tensor


def probe_tokens(vocabulary_size: int, count: int) -> list[int]:
    """Returns `count` token ids from mid-vocabulary, because special tokens are at its ends."""
    return [vocabulary_size // 2 + i % max(1, vocabulary_size // 4) for i in range(count)]


def logits_error(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest error of a row of logits `[..., V]`: RMS over the standard deviation of the expected row."""
    expected = expected.float()
    return ((logits.float() - expected).square().mean(dim=-1).sqrt() / expected.std(dim=-1)).max().item()


def logits_tolerance(weight: Tensor) -> float:
    """Returns the largest `logits_error` that rounding explains in a model whose weights have the dtype of `weight`."""
    if weight.element_size() < 4:
        return 0.5  # bfloat16 alone moves logits by 0.25 relative to float32
    return 0.1 if weight.is_cuda and torch.get_float32_matmul_precision() != "highest" else 1e-3  # TF32, or float32
