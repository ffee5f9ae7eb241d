"""Checks the arguments of `step` and converts them to tensors on its device, a `Scored`, or a `Rollout`'s rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.limits import context_length, decoder_start, vocabulary_sizes
from trl.rollout import rollout_rows
from trl.trainer.checks import (
    check_lists,
    check_logprobs,
    check_per_token,
    check_room,
    check_scores,
    check_start,
    check_tokens,
)
from trl.types import Rollout, Scored


def check_batch(
    model: nn.Module,
    batch_size: int | None,
    queries: Any,
    responses: Any,
    scores: Any,
    *,
    is_encoder_decoder: bool,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Checks queries, responses and scores for `model`, and copies them to `device`.

    Raises:
        ValueError: if an argument is invalid; the message names it, its value and what is expected.
    """
    check_lists(batch_size, queries=queries, responses=responses, scores=scores)
    query_vocabulary, response_vocabulary = vocabulary_sizes(model)
    context = context_length(model)  # for an encoder-decoder, the decoder's
    check_tokens("queries", queries, vocabulary=query_vocabulary)
    check_tokens("responses", responses, vocabulary=response_vocabulary, least=2 if is_encoder_decoder else 1)
    if is_encoder_decoder:
        check_start(responses, decoder_start(model))
        check_room([len(q) for q in queries], context_length(model, encoder=True), "the query")
        check_room([len(r) for r in responses], context, "the response")
    else:
        lengths = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
        check_room(lengths, context, "query + response")
    scalars = check_scores(scores)
    # Copies, since the caller may reuse its buffers before a prepared batch is trained on.
    q, r, s = ([tensor.to(device, copy=True) for tensor in tensors] for tensors in (queries, responses, scalars))
    return q, r, s


def check_extras(
    responses: list[Tensor],
    response_masks: list[Tensor] | None,
    token_rewards: list[Tensor] | None,
    sampler_logprobs: list[Tensor] | None,
    *,
    is_encoder_decoder: bool,
) -> None:
    """Checks the optional arguments of `step`, one tensor per response each.

    Raises:
        ValueError: if an argument is invalid; the message names it, its value and what is expected.
    """
    for name, values in (
        ("response_masks", response_masks),
        ("token_rewards", token_rewards),
        ("sampler_logprobs", sampler_logprobs),
    ):
        if values is not None:
            check_lists(len(responses), **{name: values})
            check_per_token(name, values, responses)
    check_logprobs(sampler_logprobs or [])
    for i, mask in enumerate(response_masks or []):
        # All zeros excludes the sample; but a mask that keeps only the start token leaves nothing to train on.
        if mask.any() and not mask[int(is_encoder_decoder) :].any():
            raise ValueError(f"response_masks[{i}] keeps only the decoder's start token, which is not trained on")


def to_scored(scores: Sequence[Tensor], token_rewards: Sequence[Tensor] | None, *, skip: int) -> Scored:
    """Converts the scores given to `step`.

    Args:
        scores: `B` single-element tensors.
        token_rewards: one number per response token, or None.
        skip: number of unsampled tokens at the start of a response: 1 for an encoder-decoder, else 0.
    """
    count = len(scores)
    return Scored(
        scores=torch.stack(list(scores)).tolist(),
        components={},
        token_rewards=[None] * count if token_rewards is None else [r[skip:].tolist() for r in token_rewards],
        seconds=[0.0] * count,
        errors=[None] * count,
    )


def split_rollout(rollout: Rollout) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Splits a rollout, as an engine returns it, into the queries, responses and sampler_logprobs of `step`.

    Raises:
        ValueError: if its mask leaves out response tokens, since the start of a response is then unknown.
    """
    skip = int(rollout.encoder_tokens is not None)
    counts, first = rollout.mask.sum(dim=1), rollout.mask.long().argmax(dim=1)
    columns = torch.arange(rollout.attention.shape[1], device=rollout.tokens.device)
    last = torch.where(rollout.attention.bool(), columns, 0).amax(dim=1)
    if bool((invalid := (counts == 0) | (last - first != counts)).any()):
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"rollout: the mask of row {row} covers {int(counts[row])} tokens, which are not one contiguous block up "
            "to the end of the response: pass queries, responses and response_masks instead"
        )
    queries, responses = rollout_rows(rollout)
    if rollout.sampler_logprobs is None:
        return queries, responses, None
    logprobs = rollout.sampler_logprobs[rollout.mask].split(counts.tolist())
    return queries, responses, [nn.functional.pad(row, (skip, 0)) for row in logprobs]
