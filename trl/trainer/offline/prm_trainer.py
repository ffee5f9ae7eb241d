"""Process reward models: a token classifier learns which steps of a solution are right."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, TrainingArguments, set_seed

from trl.data.formats import prepare
from trl.data.pairs import dropped
from trl.data.step_rows import StepCollator, step_row
from trl.data.tokenized import IGNORED
from trl.functional.step_labels import step_logits, step_loss
from trl.models.padding import left_aligning_order, reorder
from trl.models.trunk import base_language_model
from trl.rewards.steps import step_tokens
from trl.trainer.offline.preference_config import with_quantization
from trl.trainer.offline.preference_stage import PreferenceTrainer, PreparedRows, columns_of, mean_of
from trl.trainer.offline.prm_config import PRMConfig
from trl.trainer.offline.stage import load_stage_model, name_of, stage_tokenizer, with_adapter
from trl.trainer.offline.stage_card import StageKind
from trl.trainer.utils import disable_dropout_in_model

logger = logging.getLogger(__name__)


class PRMTrainer(PreferenceTrainer):
    """Trains a process reward model on solutions whose steps are labelled (Lightman et al. 2023, arXiv:2305.20050).

    Data are rows of texts with `prompt`, `completions` (a list of steps) and `labels` (for each step True, False, or
    the probability that it is right), or of `input_ids` and `labels` (-100 where a token ends no step). They come as a
    `datasets.Dataset`, a list of rows, or a JSONL, CSV or Parquet file. The loss is the mean over all steps of an
    optimizer step.

    Args:
        model: a token classifier with 1 or 2 outputs, possibly with an adapter; or a hub id or folder, loaded with two.
        args: settings; `transformers.TrainingArguments` are taken over.
        data_collator: replaces `trl.data.step_rows.StepCollator`; must return what that returns.
        train_dataset: rows with labelled steps.
        eval_dataset: rows with labelled steps, or a mapping of several data sets.
        processing_class: the tokenizer; None loads the model's.
        model_init: makes the model, in place of `model`.
        compute_metrics: metrics of an evaluation besides the accuracy, from `[N, K, 2]` probabilities of each of a
            row's K steps to be wrong and right, and `[N, K]` labels; -100 where a row has fewer steps.
        callbacks: as of `transformers.Trainer`.
        optimizers: optimizer and scheduler, as of `transformers.Trainer`.
        preprocess_logits_for_metrics: as of `transformers.Trainer`.
        peft_config: trains a new adapter.
        quantization_config: how to quantise a model that is given as an id or folder.

    Raises:
        ValueError: if an argument is not supported, or a row is not sound: see `trl.data.formats`.
    """

    stage_kind = StageKind(
        tag="prm",
        summary="trained on labelled steps",
        method="On solutions, by the cross-entropy of each step's label "
        "([arXiv:2305.20050](https://arxiv.org/abs/2305.20050))",
        reward="StepReward",
    )
    row_columns: ClassVar[tuple[str, ...]] = ("input_ids", "labels")

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: Any = None,
        *,
        quantization_config: Any = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise ValueError("pass either model or model_init")
        set_seed(TrainingArguments.seed if args is None else args.seed)  # of a new output layer and a new adapter
        if model_init is not None:
            model = model_init()
        args = PRMConfig.from_arguments(args, output_dir=name_of(model, "prm"))
        args = with_quantization(args, model, quantization_config)
        model = _load_token_classifier(model, args)
        base_language_model(model).config.step_separator = args.step_separator  # saved with it, for `StepReward`
        self.args = args
        self.processing_class = stage_tokenizer(processing_class, None, model, args)
        model = with_adapter(model, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or StepCollator(self.processing_class.pad_token_id, args.pad_to_multiple_of),
            train_dataset=self.tokenised(train_dataset, "train_dataset"),
            eval_dataset=self.tokenised(eval_dataset, "eval_dataset"),
            processing_class=self.processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def prepare_rows(self, dataset: Any, name: str) -> Any:
        """Tokenises rows with labelled steps; rows of tokens are left as they are, for the collator."""
        if "input_ids" in (columns_of(dataset) or ()):
            return dataset
        args = self.args
        data = prepare(dataset, "stepwise_supervision", self.processing_class, name=name)
        prompts, steps = step_tokens(
            self.processing_class,
            [row["prompt"] for row in data.rows],
            [row["completions"] for row in data.rows],
            args.step_separator,
        )
        inside = [
            row for row, entry in enumerate(data.rows) if any(args.step_separator in s for s in entry["completions"])
        ]
        if inside:
            logger.warning(
                "%s: %d of %d rows have a step with the separator %r inside, where StepReward ends a step: split these "
                "steps, or set another step_separator. The first: %s",
                name,
                len(inside),
                len(data.rows),
                args.step_separator,
                data.locations[inside[0]],
            )
        rows = PreparedRows()
        for row, prompt, parts in zip(data.rows, prompts, steps, strict=True):
            labels: list[float | None] = [float(label) for label in row["labels"]]
            if args.train_on_last_step_only and name == "train_dataset":
                labels[:-1] = [None] * (len(labels) - 1)
            tokens = step_row(
                prompt,
                parts,
                labels,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                max_completion_length=args.max_completion_length,
            )
            if tokens is not None:
                rows.append(tokens)
        dropped(len(data.rows), len(rows), args.max_length, name)
        return rows

    def rows_of(self, batch: Mapping[str, Any]) -> int:
        """Returns the number of labelled steps in a batch, over which the loss is a mean."""
        return int((batch["labels"] != IGNORED).sum())

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns `[n]` losses of a batch's steps, and `[B, K, 2]` probabilities that each is wrong and right."""
        attention = inputs["attention_mask"].bool()
        order = left_aligning_order(attention)
        pad = self.processing_class.pad_token_id
        outputs = model(
            input_ids=reorder(inputs["input_ids"].masked_fill(~attention, pad), order),
            attention_mask=reorder(attention.long(), order),
        ).logits
        labels = reorder(inputs["labels"], order)
        counted = labels != IGNORED
        wide = outputs.dtype in (torch.bfloat16, torch.float16)
        logits = step_logits((outputs.float() if wide else outputs)[counted])  # [n]
        targets = labels[counted].to(logits)
        losses = step_loss(logits, targets)
        right, hits = targets > 0.5, (logits.detach() > 0) == (targets > 0.5)
        self.tally(
            {
                "accuracy": mean_of(hits),
                "accuracy/right": mean_of(hits, right),
                "accuracy/wrong": mean_of(hits, ~right),
            }
        )
        self.count_tokens(attention.sum())
        chance = logits.detach().sigmoid()
        return losses, by_row(torch.stack([1 - chance, chance], dim=1), counted)

    def prediction_labels(self, inputs: Mapping[str, Any], predictions: Tensor) -> Tensor:
        """Returns `[B, K]` labels of each row's steps, -100 where it has fewer."""
        order = left_aligning_order(inputs["attention_mask"])
        labels = reorder(inputs["labels"], order)
        counted = labels != IGNORED
        return by_row(labels[counted].to(predictions), counted)


def by_row(values: Tensor, counted: Tensor) -> Tensor:
    """Arranges values of steps by row.

    Args:
        values: `[n, ...]`, row by row.
        counted: `[B, T]` bool, True at the `n` places where steps end.

    Returns:
        `[B, K, ...]` for rows of at most K steps, -100 where a row has fewer.
    """
    row, column = counted.nonzero(as_tuple=True)
    place = counted.cumsum(dim=1)[row, column] - 1
    shape = (len(counted), int(counted.sum(dim=1).max()), *values.shape[1:])
    return values.new_full(shape, float(IGNORED)).index_put((row, place), values)


def _load_token_classifier(model: Any, args: PRMConfig) -> Any:
    """Returns the classifier: an object as it is, or that of an id or folder, by default with two outputs.

    Raises:
        ValueError: if it is no token classifier, or has another number of outputs.
    """
    if isinstance(model, str):
        args = copy.copy(args)
        args.model_init_kwargs = {"num_labels": 2, **args.init_kwargs}
    model = load_stage_model(model, AutoModelForTokenClassification, args)
    base = base_language_model(model)
    if not type(base).__name__.endswith("ForTokenClassification") or base.config.num_labels not in (1, 2):
        raise ValueError(
            f"model is a {type(base).__name__} with {base.config.num_labels} outputs: a process reward model is a "
            "token classifier with 1 or 2. Load it with AutoModelForTokenClassification.from_pretrained(..., "
            "num_labels=2), or pass its id or folder"
        )
    return model
