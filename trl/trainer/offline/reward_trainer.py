"""Reward models: a classifier with one output learns which of two responses people prefer."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed

from trl.data.formats import Prepared, prepare
from trl.data.pairs import PairCollator, dropped, token_ids
from trl.data.tokenized import IGNORED
from trl.functional.preferences import Reliability, pairwise_loss, preference_reliability
from trl.models.adapters import is_peft_model
from trl.models.padding import left_aligning_order, reorder
from trl.models.trunk import base_language_model
from trl.trainer.offline.preference_config import with_old_arguments, with_quantization
from trl.trainer.offline.preference_stage import PreferenceTrainer, PreparedRows, columns_of, mean_of
from trl.trainer.offline.reward_config import RewardConfig
from trl.trainer.offline.stage import load_stage_model, name_of, stage_tokenizer, with_adapter
from trl.trainer.offline.stage_card import StageKind
from trl.trainer.utils import disable_dropout_in_model
from trl.types import Tally

logger = logging.getLogger(__name__)

# Columns of TRL 0.4's data sets.
_OLD_COLUMNS = ("input_ids_chosen", "attention_mask_chosen", "input_ids_rejected", "attention_mask_rejected")


def compute_accuracy(eval_pred: Any) -> dict[str, float]:
    """Returns the share of rows, or of steps, whose largest prediction is the label's; a tie is wrong.

    Args:
        eval_pred: `[N, 2]` predictions and `[N]` labels, or `[N, K, 2]` and `[N, K]` of which -100 does not count, as a
            pair or a `transformers.EvalPrediction`.
    """
    predictions, labels = (np.asarray(part) for part in (eval_pred[0], eval_pred[1]))
    if predictions.ndim == 3:
        predictions, labels = predictions[labels != IGNORED], labels[labels != IGNORED] > 0.5
    best = predictions.max(axis=1, keepdims=True)
    right = (predictions.argmax(axis=1) == labels) & ((predictions == best).sum(axis=1) == 1)
    return {"accuracy": float(right.mean())}


def compute_preference_metrics(eval_pred: Any) -> dict[str, float]:
    """Returns the accuracy and the expected calibration error of `RewardTrainer`'s predictions."""
    error = float(preference_reliability(_gaps(eval_pred[0])).error)
    return compute_accuracy(eval_pred) | {"expected_calibration_error": error}


def _gaps(predictions: Any) -> Tensor:
    """Recovers `[N]` gaps of rewards from `[N, 2]` probabilities."""
    chosen, rejected = torch.as_tensor(np.asarray(predictions), dtype=torch.float64).log().unbind(dim=1)
    return chosen - rejected


@dataclass
class RewardDataCollatorWithPadding:
    """Collator of TRL 0.4: pads tokenised pairs to the longest chosen and the longest rejected text of a batch.

    Args:
        tokenizer: pads, on its `padding_side`.
        padding: as of `tokenizer.pad`.
        max_length: as of `tokenizer.pad`.
        pad_to_multiple_of: as of `tokenizer.pad`.
        return_tensors: as of `tokenizer.pad`.
    """

    tokenizer: Any
    padding: bool | str = True
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collates rows with `input_ids` and `attention_mask` of `_chosen` and `_rejected`, and optionally a `margin`.

        Raises:
            ValueError: if a row lacks a column.
        """
        for row in features:
            if missing := [name for name in _OLD_COLUMNS if name not in row]:
                raise ValueError(
                    f"a row has the columns {', '.join(row) or '(none)'}, without {', '.join(missing)}: give texts in "
                    f"the columns chosen and rejected, or token ids in {', '.join(_OLD_COLUMNS)}"
                )
        batch: dict[str, Any] = {}
        for answer in ("chosen", "rejected"):
            names = ("input_ids", "attention_mask")
            rows = [{name: row[f"{name}_{answer}"] for name in names} for row in features]
            whole = self.tokenizer.pad(
                rows,
                padding=self.padding,
                max_length=self.max_length,
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors=self.return_tensors,
            )
            batch |= {f"{name}_{answer}": whole[name] for name in names}
        if "margin" in features[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in features])
        return batch | {"return_loss": True}


class RewardTrainer(PreferenceTrainer):
    """Trains a reward model on pairs of a chosen and a rejected response (Ouyang et al. 2022, arXiv:2203.02155).

    Data are rows with `chosen` and `rejected`, as texts or as chat messages, and optionally a `prompt` before both and
    a `margin`; or TRL 0.4's tokenised rows. They come as a `datasets.Dataset`, a list of rows, or a JSONL, CSV or
    Parquet file.

    Args:
        model: a sequence classifier, or a hub id or folder, which is loaded with one output.
        args: settings; `transformers.TrainingArguments` are taken over.
        data_collator: replaces the default collator; must return what `trl.data.pairs.PairCollator` or
            `RewardDataCollatorWithPadding` returns.
        train_dataset: preference rows.
        eval_dataset: preference rows, or a mapping of several data sets.
        processing_class: the tokenizer; None loads the model's.
        model_init: makes the model, if `model` is None.
        compute_metrics: metrics of an evaluation, from `[N, 2]` probabilities that each response is the better one;
            None for the accuracy and the expected calibration error.
        callbacks: as of `transformers.Trainer`.
        optimizers: optimizer and scheduler, as of `transformers.Trainer`.
        optimizer_cls_and_kwargs: as of `transformers.Trainer`.
        preprocess_logits_for_metrics: as of `transformers.Trainer`.
        quantization_config: how to quantise a model that is given as an id or folder.
        peft_config: trains a new adapter, and the classifier's output layer.
        tokenizer: TRL 0.4's name of `processing_class`.
        max_length: sets `args.max_length`.

    Raises:
        ValueError: if an argument is not supported, or a row is not sound: see `trl.data.formats`.
    """

    stage_kind = StageKind(
        tag="reward-trainer",
        summary="trained on preferences",
        method="On pairs of responses, by the likelihood of the preference "
        "([arXiv:2203.02155](https://arxiv.org/abs/2203.02155), eq. 1)",
        reward="ClassifierReward",
    )
    row_columns: ClassVar[tuple[str, ...]] = ("chosen_ids", "rejected_ids", "margin", *_OLD_COLUMNS)

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        model_init: Callable[[], Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        max_length: int | None = None,
    ) -> None:
        if (model is None) == (model_init is None):
            raise ValueError("pass either model or model_init")
        set_seed(TrainingArguments.seed if args is None else args.seed)  # of a new score layer and a new adapter
        if model_init is not None:
            model = model_init()
        args = RewardConfig.from_arguments(args, output_dir=name_of(model, "reward"))
        args = with_old_arguments(with_quantization(args, model, quantization_config), {"max_length": max_length}, {})
        model = _load_classifier(model, args)
        self.args = args
        self.processing_class = stage_tokenizer(processing_class, tokenizer, model, args, eos_token=args.eos_token)
        # Transformers' classifiers find the last token of a row by this id.
        base_language_model(model).config.get_text_config().pad_token_id = self.processing_class.pad_token_id
        model = with_adapter(model, peft_config)
        if is_peft_model(model) and not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n):
            logger.warning(
                "only the adapter is trained, and the classifier's output layer stays as it is: set "
                "peft_config.task_type='SEQ_CLS', or name the layer in modules_to_save, unless it has been trained "
                "before"
            )
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.has_default_collator = data_collator is None
        train_rows = self.tokenised(train_dataset, "train_dataset")
        eval_rows = self.tokenised(eval_dataset, "eval_dataset")
        if args.remove_unused_columns and (train_rows is train_dataset is not None or _has_old_columns(train_dataset)):
            warnings.warn("remove_unused_columns=True would remove the tokens' columns: set to False", stacklevel=2)
            args.remove_unused_columns = False
        if compute_metrics is None and not args.batch_eval_metrics:
            compute_metrics = compute_preference_metrics
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or PairCollator(self.processing_class.pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=self.processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    def prepare_rows(self, dataset: Any, name: str) -> Any:
        """Tokenises preference rows; rows that are no texts or chats are left as they are, for the collator."""
        columns = columns_of(dataset)
        if columns is not None and not {"chosen", "rejected"} & columns:
            if {"chosen_ids", "rejected_ids"} <= columns:
                return self._trl_within(PreparedRows(dict(row) for row in dataset), name)
            if _has_old_columns(dataset) and self.has_default_collator:
                return self._trl_within(PreparedRows(map(_from_old_columns, dataset)), name)
            return dataset
        data = prepare(dataset, "preference", self.processing_class, name=name, split_prompts=False)
        tokens = {
            answer: token_ids(
                self.processing_class,
                [row.get("prompt", "") + row[answer] for row in data.rows],
                rendered=data.rendered,
                end=self.args.append_eos,
            )
            for answer in ("chosen", "rejected")
        }
        margins = [{} if margin is None else {"margin": margin} for margin in _margins(data)]
        rows = PreparedRows(
            {"chosen_ids": np.asarray(chosen, np.int32), "rejected_ids": np.asarray(rejected, np.int32)} | margin
            for chosen, rejected, margin in zip(tokens["chosen"], tokens["rejected"], margins, strict=True)
        )
        return self._trl_within(rows, name)

    def _trl_within(self, rows: PreparedRows, name: str) -> PreparedRows:
        """Leaves out rows with a text that is longer than `max_length`."""
        limit = self.args.max_length
        if limit is None:
            return rows
        short = PreparedRows(row for row in rows if max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit)
        dropped(len(rows), len(short), limit, name)
        return short

    def rows_of(self, batch: Mapping[str, Any]) -> int:
        """Returns the number of pairs in a batch."""
        return len(batch["input_ids_chosen"]) if "input_ids_chosen" in batch else len(batch["input_ids"]) // 2

    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns `[B]` losses, and `[B, 2]` probabilities that the chosen and the rejected response is better."""
        tokens, attention = _joined(inputs)
        rewards = score_texts(model, tokens, attention)  # [2·B, labels]
        chosen, rejected = rewards.chunk(2)
        margin = inputs["margin"][:, None] if "margin" in inputs else None
        centring = self.args.center_rewards_coefficient or 0.0
        losses = pairwise_loss(chosen, rejected, margin=margin, centring=centring).mean(dim=1)
        means = rewards.detach().mean(dim=1)
        better, worse = means.chunk(2)
        self.tally(
            {
                "accuracy": mean_of((better > worse).float()),
                "margin": mean_of(better - worse),
                "min_reward": Tally(means.min(), torch.ones_like(means[0])),
                "mean_reward": mean_of(means),
                "max_reward": Tally(means.max(), torch.ones_like(means[0])),
            }
        )
        self.count_tokens(attention.sum())
        return losses, torch.stack([better, worse], dim=1).softmax(dim=1)

    def calibration(self, dataset: Any = None, *, bins: int = 20) -> Reliability:
        """Returns how often the response with the higher reward is the chosen one, by how sure the rewards are of it.

        Args:
            dataset: preference rows; None takes `eval_dataset`.
            bins: number of bins of predicted probability over [0, 1], of which the upper half is filled.

        Raises:
            ValueError: if there is no data set.
        """
        rows = self.eval_dataset if dataset is None else dataset
        if rows is None or (dataset is None and isinstance(rows, Mapping)):
            raise ValueError("calibration needs a data set: pass one, or give the constructor a single eval_dataset")
        return preference_reliability(_gaps(self.predict(rows).predictions), bins=bins)


def score_texts(model: nn.Module, tokens: Tensor, attention: Tensor) -> Tensor:
    """Runs a sequence classifier on texts that are padded on either side.

    Args:
        model: its configuration's `pad_token_id` is not None.
        tokens: `[B, T]`; padding may be anything.
        attention: `[B, T]`.

    Returns:
        `[B, labels]` float32 scores.
    """
    attention = attention.bool()
    order = left_aligning_order(attention)[:, : int(attention.sum(dim=1).max())]
    pad = base_language_model(model).config.get_text_config().pad_token_id
    inputs = {
        "input_ids": reorder(tokens.masked_fill(~attention, pad), order),
        "attention_mask": reorder(attention.long(), order),
    }
    scores: Tensor = model(**inputs).logits
    return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores


def _joined(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns tokens and attention `[2·B, T]`, chosen texts first, of a batch of either collator."""
    if "input_ids" in inputs:
        return inputs["input_ids"], inputs["attention_mask"]
    width = max(inputs["input_ids_chosen"].shape[1], inputs["input_ids_rejected"].shape[1])

    def joined(name: str) -> Tensor:
        parts = [inputs[f"{name}_{answer}"] for answer in ("chosen", "rejected")]
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])

    return joined("input_ids"), joined("attention_mask")


def _margins(data: Prepared) -> list[float | None]:
    """Returns the margin of each row, or None for all of them.

    Raises:
        ValueError: if some rows have no margin, or one that is no finite number.
    """
    margins = [row.get("margin") for row in data.rows]
    if all(margin is None for margin in margins):
        return margins
    for location, margin in zip(data.locations, margins, strict=True):
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not np.isfinite(margin):
            raise ValueError(
                f"{location}, column 'margin', is {margin!r}: expected a finite number in every row. Correct the row, "
                "or remove the column"
            )
    return margins


def _from_old_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenised row of TRL 0.4 with the columns of `PairCollator`, without what its attention masks hide."""
    columns = {name: np.asarray(row[name]) for name in _OLD_COLUMNS}
    tokens = {
        f"{answer}_ids": columns[f"input_ids_{answer}"][columns[f"attention_mask_{answer}"].astype(bool)]
        for answer in ("chosen", "rejected")
    }
    return tokens | ({"margin": row["margin"]} if "margin" in row else {})


def _has_old_columns(dataset: Any) -> bool:
    return set(_OLD_COLUMNS) <= (columns_of(dataset) or set())


def _load_classifier(model: Any, args: RewardConfig) -> Any:
    """Returns the classifier: an object as it is, or that of an id or folder with one output.

    Raises:
        ValueError: if it is no sequence classifier.
    """
    if isinstance(model, str):
        args = copy.copy(args)
        args.model_init_kwargs = {"num_labels": 1, **args.init_kwargs}
    model = load_stage_model(model, AutoModelForSequenceClassification, args)
    base = base_language_model(model)
    if not type(base).__name__.endswith("ForSequenceClassification"):
        raise ValueError(
            f"model is a {type(base).__name__}: a reward model is a sequence classifier. Load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or pass its id or folder"
        )
    return model
