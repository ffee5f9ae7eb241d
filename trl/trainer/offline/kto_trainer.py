"""Kahneman-Tversky optimisation: a policy learns from single responses that are labelled as good or bad."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl.data.formats import prepare
from trl.data.pairs import LengthLimits, prompts_and_answers, rows_within
from trl.functional.preferences import kto_loss
from trl.models.trunk import evaluation_mode
from trl.trainer.offline.answer_logprobs import answer_rollout, score_answers
from trl.trainer.offline.kto_config import KTOConfig
from trl.trainer.offline.preference_config import with_old_arguments, with_quantization
from trl.trainer.offline.preference_stage import PreparedRows, mean_of
from trl.trainer.offline.referenced_stage import OLD_ARGUMENTS, ReferencedTrainer
from trl.trainer.offline.stage import name_of
from trl.trainer.offline.stage_card import StageKind
from trl.training.processes import sum_over_processes
from trl.types import Tally

logger = logging.getLogger(__name__)

ANSWERS = ("completion_ids", "KL_completion_ids")
REF_COLUMNS = ("ref_logps", "ref_KL_logps")


class KTOTrainer(ReferencedTrainer):
    """Trains a policy on responses with a label (Ethayarajh et al. 2024, arXiv:2402.01306).

    Data are rows with `prompt`, `completion` and `label` (True: desirable), as texts or as chat messages; a preference
    row becomes two. Their order is that of training: shuffle them first.

    Args:
        model: a causal or encoder-decoder language model, possibly with an adapter; or a hub id or folder.
        ref_model: the reference, π_ref; None takes the policy as it is now: see `KTOConfig.precompute_ref_log_probs`.
        args: settings; `transformers.TrainingArguments` are taken over.
        data_collator: replaces `trl.data.pairs.AnswerCollator`; must return what that returns.
        train_dataset: rows with labels.
        eval_dataset: rows with labels, or a mapping of several data sets.
        processing_class: the tokenizer; None loads the model's.
        compute_metrics: further metrics of an evaluation, from `[N, 2]`: the reward, and 1 where it is desirable.
        callbacks: as of `transformers.Trainer`.
        optimizers: optimizer and scheduler, as of `transformers.Trainer`.
        quantization_config: how to quantise a model that is given as an id or folder.
        peft_config: trains a new adapter; its base is then the reference.
        tokenizer: TRL 0.8's name of `processing_class`.
        preprocess_logits_for_metrics: as of `transformers.Trainer`.
        **old_arguments: settings of `KTOConfig` by name.

    Raises:
        ValueError: if an argument is not supported, or a row is not sound: see `trl.data.formats`.
        TypeError: for an unknown argument.
    """

    stage_kind = StageKind(
        tag="kto",
        summary="fine-tuned on labelled responses",
        method="KTO ([arXiv:2402.01306](https://arxiv.org/abs/2402.01306)), on single responses that are labelled good "
        "or bad",
    )
    row_columns: ClassVar[tuple[str, ...]] = ("prompt_ids", *ANSWERS, "label", *REF_COLUMNS)

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        tokenizer: Any = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        **old_arguments: Any,
    ) -> None:
        args = KTOConfig.from_arguments(args, output_dir=name_of(model, "kto"))
        args = with_old_arguments(with_quantization(args, model, quantization_config), old_arguments, OLD_ARGUMENTS)
        self.answers = ANSWERS if args.estimates_kl else ANSWERS[:1]
        super().__init__(
            model,
            ref_model,
            args,
            processing_class=processing_class,
            tokenizer=tokenizer,
            peft_config=peft_config,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    @property
    def ref_columns(self) -> tuple[str, ...]:
        """Columns of the reference's log-probabilities."""
        return REF_COLUMNS[: len(self.answers)]

    def prepare_rows(self, dataset: Any, name: str) -> PreparedRows:
        """Tokenises rows with labels, and pairs each prompt with the response of a neighbour."""
        args = self.args
        data = prepare(dataset, "unpaired_preference", self.processing_class, name=name)
        prompts, (completions,) = prompts_and_answers(
            self.processing_class,
            [row["prompt"] for row in data.rows],
            [[row["completion"] for row in data.rows]],
            rendered=data.rendered,
            is_encoder_decoder=self.is_encoder_decoder,
        )
        limits = LengthLimits(
            total=args.max_length,
            prompt=args.max_prompt_length,
            answer=args.max_completion_length,
            mode=args.truncation_mode,
        )
        labels = [row["label"] for row in data.rows]
        columns = {"prompt_ids": prompts, "completion_ids": completions, "label": labels}
        rows = PreparedRows(rows_within(columns, limits, ANSWERS[:1], name=name))
        if args.estimates_kl:
            _add_mismatched(rows, args.per_device_train_batch_size, name)
        if name == "train_dataset":
            _check_balance([row["label"] for row in rows], args, name)
        return rows

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns `[B]` losses, and `[B, 2]`: rewards β log π/π_ref, and 1 where the response is desirable."""
        args, desirable = self.args, inputs["label"]
        count = len(desirable)
        policy = score_answers(model, answer_rollout(inputs, slice(0, count)))
        references = self.reference_logprobs(inputs, answer_rollout(inputs))
        ratios = policy.logprobs - references[0]
        kl = torch.zeros((), device=ratios.device)
        if args.estimates_kl:
            with torch.no_grad(), evaluation_mode(model):
                mismatched = score_answers(model, answer_rollout(inputs, slice(count, None)), details=False)
            totals = torch.stack([(mismatched.logprobs - references[1]).sum(), kl + count])
            total, rows = sum_over_processes(self.accelerator, totals)
            kl = (total / rows).clamp(min=0)
        losses = kto_loss(
            ratios,
            desirable,
            kl,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        rewards = args.beta * ratios.detach()
        metrics = {
            "kl": Tally(kl, torch.ones_like(kl)),
            "entropy": Tally(policy.entropy_sum.sum(), policy.tokens.sum()),
        }
        for name, rows_of in (("chosen", desirable), ("rejected", ~desirable)):
            metrics |= {
                f"rewards/{name}": mean_of(rewards, rows_of),
                f"logps/{name}": mean_of(policy.logprobs, rows_of),
                f"logits/{name}": Tally(policy.logit_sum[rows_of].sum(), policy.tokens[rows_of].sum()),
            }
        self.tally(metrics)
        self.count_tokens(inputs["attention_mask"][:count].sum())
        return losses, torch.stack([rewards, desirable.to(rewards)], dim=1)

    def _trl_means(self, mode: str) -> dict[str, float]:
        means = super()._trl_means(mode)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def _add_mismatched(rows: PreparedRows, batch_size: int, name: str) -> None:
    """Gives each row the response of the row before it, and the first of a batch that of the batch's last row.

    So the mismatched responses of a batch are its own, each under another prompt: what the paper found to work best.

    Raises:
        ValueError: if there is one row only.
    """
    if len(rows) == 1:
        raise ValueError(f"{name} has one row: KTO estimates the KL by pairing a prompt with another row's response")
    for start in range(0, len(rows), batch_size):
        last = min(start + batch_size, len(rows)) - 1
        rows[start]["KL_completion_ids"] = rows[last if last > start else start - 1]["completion_ids"]
        for row in range(start + 1, last + 1):
            rows[row]["KL_completion_ids"] = rows[row - 1]["completion_ids"]


def _check_balance(labels: Sequence[bool], args: KTOConfig, name: str) -> None:
    """Warns if the weighted numbers of desirable and undesirable rows are far apart, as the paper advises against."""
    good = sum(map(bool, labels))
    bad = len(labels) - good
    if not good or not bad:
        logger.warning("%s: all %d rows have the label %s: KTO learns from both", name, len(labels), bool(good))
        return
    ratio = args.desirable_weight * good / max(args.undesirable_weight * bad, 1e-12)
    if not 1 <= round(ratio, 6) <= 4 / 3:
        logger.warning(
            "%s: %d desirable and %d undesirable rows with the weights %s and %s count as %.2f to 1; between 1 and "
            "1.33 to 1 is recommended: set desirable_weight=%.3g, or undesirable_weight=%.3g",
            name,
            good,
            bad,
            args.desirable_weight,
            args.undesirable_weight,
            ratio,
            args.undesirable_weight * bad / good,
            args.desirable_weight * good / bad,
        )
