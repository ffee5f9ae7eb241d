"""Argument validation for `PPOTrainer.step`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_lists(batch_size: int | None, **lists: Any) -> None:
    """Checks that every argument is a list of `batch_size` tensors (of any length if None).

    Raises:
        ValueError: if one is not; names the argument, what it is and what is expected.
    """
    for name, values in lists.items():
        if not isinstance(values, list):
            raise ValueError(f"{name} must be a list of tensors, not {type(values).__name__}")
        if batch_size is not None and len(values) != batch_size:
            raise ValueError(f"{name} has {len(values)} elements; expected batch_size={batch_size}")
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name}[{i}] must be a tensor, not {type(value).__name__}")


def check_tokens(name: str, sequences: Sequence[Tensor], *, vocabulary: int | None, least: int = 1) -> None:
    """Checks that every sequence is a 1-D integer tensor of at least `least` token ids within the vocabulary.

    Raises:
        ValueError: if one is not; names the sequence and the problem.
    """
    for i, tokens in enumerate(sequences):
        if tokens.dim() != 1:
            raise ValueError(f"{name}[{i}] must be a 1-D tensor of token ids, not of shape {tuple(tokens.shape)}")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"{name}[{i}] must hold token ids (int64), not {tokens.dtype}")
        if len(tokens) < least:
            problem = "is empty" if len(tokens) == 0 else f"has {len(tokens)} token"
            hint = " (the decoder's start token and a sampled token)" if least == 2 else ""
            raise ValueError(
                f"{name}[{i}] {problem}; expected at least {least}{hint}. Leave such samples out of the batch"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            allowed = "of at least 0" if vocabulary is None else f"from 0 to {vocabulary - 1}"
            raise ValueError(f"{name}[{i}] contains token id {low if low < 0 else high}; expected ids {allowed}")


def check_room(lengths: Sequence[int], context: int | None, name: str) -> None:
    """Checks that no sequence is longer than the model's context.

    Raises:
        ValueError: if one is; names the sequence, its length and the context length.
    """
    if context is None:
        return
    for i, length in enumerate(lengths):
        if length > context:
            raise ValueError(
                f"{name} of sample {i} is {length} tokens long; the model's context length is {context}: shorten it"
            )


def check_scores(scores: Sequence[Tensor]) -> list[Tensor]:
    """Checks that every score is a single finite number, 0-D or 1-D.

    Returns:
        The scores as 0-D float32 tensors.

    Raises:
        ValueError: if one is not; names the score and the problem.
    """
    scalars = []
    for i, score in enumerate(scores):
        if score.dim() > 1 or score.numel() != 1:
            raise ValueError(f"scores[{i}] must be one number (0-D or 1-D), not of shape {tuple(score.shape)}")
        if score.is_complex():
            raise ValueError(f"scores[{i}] is {score.item()}: scores must be real numbers")
        number = score.reshape(()).float()
        if not torch.isfinite(number):
            raise ValueError(f"scores[{i}] is {score.item()}: scores must be numbers that are finite in float32")
        scalars.append(number)
    return scalars


def check_per_token(name: str, values: Sequence[Tensor], responses: Sequence[Tensor]) -> None:
    """Checks that every tensor holds one real number per response token, finite in float32.

    Raises:
        ValueError: if one does not; names the element and the problem.
    """
    for i, (value, response) in enumerate(zip(values, responses, strict=True)):
        if value.shape != response.shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(value.shape)}; its response has {tuple(response.shape)}")
        if value.is_complex():
            raise ValueError(f"{name}[{i}] has dtype {value.dtype}; expected real numbers")
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"{name}[{i}] contains a number that is not finite in float32")


def check_logprobs(sampler_logprobs: Sequence[Tensor]) -> None:
    """Checks that log-probabilities are at most 0, up to rounding.

    Raises:
        ValueError: if one is above; names the element and the number.
    """
    for i, logprobs in enumerate(sampler_logprobs):
        if float(logprobs.max()) > 1e-3:  # tolerance for rounding
            raise ValueError(
                f"sampler_logprobs[{i}] contains {float(logprobs.max()):.3g}; log-probabilities must be at most 0"
            )


def check_start(responses: Sequence[Tensor], start: int | None) -> None:
    """Warns if encoder-decoder responses lack the decoder's start token: their first token is not trained on."""
    first_tokens = [int(r[0]) for r in responses if start is not None and int(r[0]) != start]
    if first_tokens:
        warnings.warn(
            f"{len(first_tokens)} of {len(responses)} responses do not begin with the decoder's start token {start} "
            f"but, for example, with {first_tokens[0]}. The first token of an encoder-decoder's response is decoder "
            "input and is not trained on. Was the start token stripped?",
            stacklevel=4,
        )
