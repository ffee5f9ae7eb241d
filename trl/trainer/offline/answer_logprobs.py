"""Log-probabilities of answers under the policy and its reference, which DPO and KTO compare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from trl.models import create_reference_model, evaluate, reference_mode
from trl.models.adapters import adapter_starts_at_zero, is_peft_model
from trl.models.trunk import evaluation_mode
from trl.training.processes import sum_over_processes
from trl.types import Rollout

logger = logging.getLogger(__name__)

ReferenceModel: TypeAlias = Callable[[], AbstractContextManager[nn.Module]]
Rows: TypeAlias = list[dict[str, Any]]
Collator: TypeAlias = Callable[[Rows], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model says about the answers of a batch, one row each."""

    logprobs: Tensor  # [B] summed over the answer's tokens
    tokens: Tensor  # [B] number of tokens that are predicted, at least 1
    entropy_sum: Tensor  # [B] sum over the answer's tokens, detached
    logit_sum: Tensor  # [B] sum over the answer's tokens of the mean logit, detached
    top1_sum: Tensor  # [B] number of the answer's tokens that are the most likely ones

    def __getitem__(self, rows: slice | Tensor) -> Answers:
        return Answers(
            logprobs=self.logprobs[rows],
            tokens=self.tokens[rows],
            entropy_sum=self.entropy_sum[rows],
            logit_sum=self.logit_sum[rows],
            top1_sum=self.top1_sum[rows],
        )


def answer_rollout(batch: Mapping[str, Tensor], rows: slice = slice(None)) -> Rollout:
    """Turns rows of an `AnswerCollator` batch, padded on either side, into a rollout whose mask covers the answers."""
    names = ("decoder_input_ids", "decoder_attention_mask") if "decoder_input_ids" in batch else _DECODER_ONLY
    tokens, attention = batch[names[0]][rows], batch[names[1]][rows].bool()
    encoder: dict[str, Any] = {}
    if names is not _DECODER_ONLY:
        encoder = {
            "encoder_tokens": batch["input_ids"][rows],
            "encoder_attention": batch["attention_mask"][rows].bool(),
        }
    # The first token of a sequence is predicted from nothing, so it does not count.
    mask = batch["completion_mask"][rows, 1:].bool() & attention[:, 1:] & attention[:, :-1]
    return Rollout(tokens=tokens, attention=attention, mask=mask, **encoder)


_DECODER_ONLY = ("input_ids", "attention_mask")


def score_answers(model: nn.Module, rollout: Rollout, *, details: bool = True) -> Answers:
    """Sums a model's log-probabilities over the answers of a rollout, without materialising logits where the model can.

    Args:
        model: a language model; the caller sets train/eval mode, grad mode and autocast.
        rollout: from `answer_rollout`.
        details: also compute entropies, mean logits and most likely tokens; zeros without.
    """
    said = evaluate(
        model, rollout, entropy=details, values=False, response_only=True, mean_logits=details, top1=details
    )

    def total(values: Tensor | None) -> Tensor:
        if values is None:
            return torch.zeros(len(rollout), device=rollout.tokens.device)
        return values.masked_fill(~rollout.mask, 0).sum(dim=1)

    entropy = None if said.entropy is None else said.entropy.detach()
    return Answers(
        logprobs=total(said.logprobs),
        tokens=rollout.mask.sum(dim=1).clamp(min=1),
        entropy_sum=total(entropy),
        logit_sum=total(said.mean_logits),
        top1_sum=total(said.top1),
    )


def make_reference(policy: nn.Module, ref_model: nn.Module | None) -> tuple[ReferenceModel, nn.Module | None]:
    """Chooses what serves as the policy before training: the cheapest model that gives its numbers.

    That is `ref_model` if given, else the policy with its adapter switched off where that changes nothing, else a
    frozen copy.

    Returns:
        A function whose context manager yields the model, and that model if it is another than the policy.
    """
    if ref_model is None and is_peft_model(policy) and adapter_starts_at_zero(policy):
        return lambda: reference_mode(policy), None
    frozen = create_reference_model(policy) if ref_model is None else ref_model.eval().requires_grad_(False)
    return lambda: nullcontext(frozen), frozen


def cache_ref_logprobs(
    rows: Rows,
    columns: Sequence[str],
    reference: ReferenceModel,
    collate: Collator,
    *,
    batch_size: int,
    accelerator: Any,
) -> None:
    """Writes the reference's log-probabilities of every row's answers into the row.

    Rows are batched by length, so that little is padded, and shared out among the processes. Rows that have the columns
    already, such as those of a saved data set, are left as they are.

    Args:
        rows: tokenised rows.
        columns: names of the columns to write, one for each of the collator's answers.
        reference: from `make_reference`.
        collate: an `AnswerCollator`.
        batch_size: rows per pass.
        accelerator: spans the processes; every process must call this with the same rows.
    """
    if all(column in row for row in rows for column in columns):
        return
    order = sorted(range(len(rows)), key=lambda row: _length(rows[row]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found = torch.zeros(len(rows), len(columns), device=accelerator.device)
    with reference() as model, evaluation_mode(model), torch.no_grad(), accelerator.autocast():
        device = next(model.parameters()).device
        for members in batches[accelerator.process_index :: accelerator.num_processes]:
            batch = {name: x.to(device) for name, x in collate([rows[row] for row in members]).items()}
            logprobs = score_answers(model, answer_rollout(batch), details=False).logprobs
            found[members] = logprobs.view(len(columns), len(members)).T.to(found)
    for row, values in zip(rows, sum_over_processes(accelerator, found).tolist(), strict=True):
        row.update(zip(columns, values, strict=True))
    logger.info("computed the reference's log-probabilities of %d rows", len(rows))


def _length(row: Mapping[str, Any]) -> int:
    return max(len(value) for name, value in row.items() if name.endswith("_ids"))
