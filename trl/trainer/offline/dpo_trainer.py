"""Direct preference optimisation: a policy learns from pairs of responses, without reward model or sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl.data.formats import prepare
from trl.data.pairs import LengthLimits, prompts_and_answers, rows_within
from trl.trainer.offline.answer_logprobs import Answers, answer_rollout, score_answers
from trl.trainer.offline.dpo_config import DPOConfig
from trl.trainer.offline.pair_losses import PairLogprobs, PairSettings, combined
from trl.trainer.offline.preference_config import with_old_arguments, with_quantization
from trl.trainer.offline.preference_stage import PreparedRows, mean_of
from trl.trainer.offline.referenced_stage import OLD_ARGUMENTS, ReferencedTrainer
from trl.trainer.offline.stage import name_of
from trl.trainer.offline.stage_card import StageKind
from trl.types import Tally

ANSWERS = ("chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class DPOTrainer(ReferencedTrainer):
    """Trains a policy on pairs of a chosen and a rejected response (Rafailov et al. 2023, arXiv:2305.18290).

    Data are rows with `prompt`, `chosen` and `rejected`, as texts or as chat messages; the prompt may instead begin
    both responses. They come as a `datasets.Dataset`, a list of rows, or a JSONL, CSV or Parquet file.

    Arguments of TRL 0.7 to 0.11's constructor (`beta`, `max_length`, ...) set the setting of that name in `args`.

    Args:
        model: a causal or encoder-decoder language model, possibly with an adapter; or a hub id or folder.
        ref_model: the reference, π_ref; None takes the policy as it is now: see `DPOConfig.precompute_ref_log_probs`.
        args: settings; `transformers.TrainingArguments` are taken over.
        data_collator: replaces `trl.data.pairs.AnswerCollator`; must return what that returns.
        train_dataset: preference rows.
        eval_dataset: preference rows, or a mapping of several data sets.
        processing_class: the tokenizer; None loads the model's.
        compute_metrics: further metrics of an evaluation, from `[N, 2]` rewards of chosen and rejected responses.
        callbacks: as of `transformers.Trainer`.
        optimizers: optimizer and scheduler, as of `transformers.Trainer`.
        quantization_config: how to quantise a model that is given as an id or folder.
        peft_config: trains a new adapter; its base is then the reference.
        tokenizer: TRL 0.5's name of `processing_class`.
        preprocess_logits_for_metrics: as of `transformers.Trainer`.
        **old_arguments: settings of `DPOConfig` by name, and what TRL 0.7 to 0.11 had besides.

    Raises:
        ValueError: if an argument is not supported, or a row is not sound: see `trl.data.formats`.
        TypeError: for an unknown argument.
    """

    stage_kind = StageKind(
        tag="dpo",
        summary="fine-tuned on preferences",
        method="DPO ([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)), on pairs of responses",
    )
    row_columns: ClassVar[tuple[str, ...]] = ("prompt_ids", *ANSWERS, *REF_COLUMNS)
    answers = ANSWERS

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
        args = DPOConfig.from_arguments(args, output_dir=name_of(model, "dpo"))
        args = with_old_arguments(with_quantization(args, model, quantization_config), old_arguments, OLD_ARGUMENTS)
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
        """Columns of the reference's log-probabilities, one for each column of answers."""
        return REF_COLUMNS

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares the policy with a reference."""
        return self.args.needs_reference

    def prepare_rows(self, dataset: Any, name: str) -> PreparedRows:
        """Tokenises preference rows; reference log-probabilities that they have already are kept."""
        args = self.args
        data = prepare(dataset, "preference", self.processing_class, name=name)
        texts = {column: [row[column] for row in data.rows] for column in ("prompt", "chosen", "rejected")}
        prompts, (chosen, rejected) = prompts_and_answers(
            self.processing_class,
            texts["prompt"],
            [texts["chosen"], texts["rejected"]],
            rendered=data.rendered,
            is_encoder_decoder=self.is_encoder_decoder,
        )
        given = {c: [row[c] for row in data.rows] for c in REF_COLUMNS if all(c in row for row in data.rows)}
        limits = LengthLimits(
            total=args.max_length,
            prompt=args.max_prompt_length,
            answer=args.max_target_length,
            mode=args.truncation_mode,
        )
        columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected} | given
        return PreparedRows(rows_within(columns, limits, ANSWERS, name=name))

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns `[B]` losses and `[B, 2]` rewards: β log π/π_ref of the chosen and of the rejected response."""
        rollout = answer_rollout(inputs)
        policy = score_answers(model, rollout)
        ref_chosen, ref_rejected = self.reference_logprobs(inputs, rollout)
        chosen, rejected = policy.logprobs.chunk(2)
        chosen_tokens, rejected_tokens = policy.tokens.chunk(2)
        pairs = PairLogprobs(
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
        )
        args = self.args
        settings = PairSettings(beta=args.beta, smoothing=args.label_smoothing, simpo_gamma=args.simpo_gamma)
        losses = combined(pairs, settings, args.loss_type, args.weights)
        rewards = args.beta * torch.stack([pairs.chosen_ratio, pairs.rejected_ratio], dim=1).detach()
        self._trl_tally_pairs(policy, rewards, inputs)
        return losses, rewards

    def _trl_tally_pairs(self, policy: Answers, rewards: Tensor, inputs: dict[str, Any]) -> None:
        count = len(rewards)
        chosen, rejected = policy[:count], policy[count:]
        better, worse = rewards.unbind(dim=1)
        self.tally(
            {
                "rewards/chosen": mean_of(better),
                "rewards/rejected": mean_of(worse),
                "rewards/margins": mean_of(better - worse),
                "rewards/accuracies": mean_of((better > worse).float()),
                "logps/chosen": mean_of(chosen.logprobs),
                "logps/rejected": mean_of(rejected.logprobs),
                "logits/chosen": Tally(chosen.logit_sum.sum(), chosen.tokens.sum()),
                "logits/rejected": Tally(rejected.logit_sum.sum(), rejected.tokens.sum()),
                "mean_token_accuracy": Tally(chosen.top1_sum.sum(), chosen.tokens.sum()),
                "entropy": Tally(policy.entropy_sum.sum(), policy.tokens.sum()),
            }
        )
        self.count_tokens(inputs["attention_mask"].sum())
