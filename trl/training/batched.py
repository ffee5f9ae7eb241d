"""Evaluates a model on a whole rollout in batches, outside the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trl.models import RolloutAboveFrozen, abilities, evaluate, evaluate_exact_kl, frozen_depth, frozen_states
from trl.types import Evaluation, Rollout, occupied, take, widen

# Tokens per forward pass without gradients, for models that can skip materialising their logits.
_TOKENS_PER_PASS = {"cpu": 2048, "other": 16384}


def _pieces(rollout: Rollout, batch_size: int) -> Iterator[tuple[Rollout, slice]]:
    """Yields slices of the rollout with padding trimmed, and the columns of tokens that each one keeps."""
    for start in range(0, len(rollout), batch_size):
        rows = slice(start, start + batch_size)
        columns = occupied(rollout.attention[rows])
        yield take(rollout, rows, columns), columns


def _rows_per_pass(model: nn.Module, rollout: Rollout, batch_size: int) -> int:
    """Sequences per forward pass: `batch_size`, or more for a model that can skip materialising its logits."""
    if not abilities(model).projects:
        return batch_size
    tokens = _TOKENS_PER_PASS["cpu" if rollout.tokens.device.type == "cpu" else "other"]
    return max(batch_size, tokens // rollout.tokens.shape[1])


def with_frozen_states(
    policy: nn.Module,
    rollout: Rollout,
    *,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Rollout:
    """Caches the activations of the policy's frozen first layers in the rollout, so that later passes start above them.

    Args:
        policy: in evaluation mode.
        rollout: `B` sequences.
        batch_size: sequences per pass of the update.
        autocast: context that wraps the policy's own forward.

    Returns:
        The rollout with its cached states, or `rollout` itself if no layers are frozen or the model is not supported.
    """
    if rollout.encoder_tokens is not None or not abilities(policy).projects:
        return rollout
    with autocast():
        depth = frozen_depth(policy)
        if depth == 0:
            return rollout
        rows = _rows_per_pass(policy, rollout, batch_size)
        pieces = [take(rollout, slice(start, start + rows)) for start in range(0, len(rollout), rows)]
        return RolloutAboveFrozen.of(rollout, torch.cat([frozen_states(policy, p, depth) for p in pieces]), depth)


def evaluate_in_batches(
    model: nn.Module,
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
    entropy: bool = False,
    values: bool = True,
    return_logits: bool = False,
) -> Evaluation:
    """Evaluates `model` at every position of a rollout of `B` sequences, `batch_size` sequences at a time.

    If logits need not be materialised, batches grow to a fixed number of tokens, which still takes less memory than a
    minibatch of the update.
    """
    if not return_logits:
        batch_size = _rows_per_pass(model, rollout, batch_size)
    results: dict[str, list[Tensor]] = {"logprobs": [], "values": [], "entropy": [], "logits": []}
    for piece, columns in _pieces(rollout, batch_size):
        evaluation = evaluate(
            model, piece, temperature=temperature, entropy=entropy, values=values, return_logits=return_logits
        )
        for name, parts in results.items():
            if (part := getattr(evaluation, name)) is not None:
                parts.append(widen(part, columns, rollout.mask.shape[1]))
    joined = {name: torch.cat(parts) if parts else None for name, parts in results.items()}
    assert joined["logprobs"] is not None
    return Evaluation(**joined)  # type: ignore[arg-type]


def exact_kl_of(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    rollout: Rollout,
    *,
    batch_size: int,
    temperature: float,
) -> Tensor:
    """`[B, S]` exact KL(policy || reference) at every position, computed for `batch_size` sequences at a time."""
    return torch.cat(
        [
            widen(evaluate_exact_kl(policy, reference, piece, temperature=temperature), columns, rollout.mask.shape[1])
            for piece, columns in _pieces(rollout, batch_size)
        ]
    )
