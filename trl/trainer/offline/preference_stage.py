"""Common base of training on preferences: tokenised rows, losses per optimizer step, one pass per evaluation batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trl.trainer.offline.stage import StageTrainer
from trl.trainer.offline.stage_card import source_name
from trl.training.processes import sum_over_processes
from trl.types import Tally


class PreparedRows(list[dict[str, Any]]):
    """The tokenised rows of a data set, one mapping of columns each."""


class PreferenceTrainer(StageTrainer):
    """A stage whose data set is tokenised into `PreparedRows`, and whose loss is a mean over rows.

    The mean is taken over all rows of an optimizer step, on all processes and in all accumulated batches, so that how a
    step is cut into batches does not change its gradient.
    """

    # The columns of a row that the collator reads.
    row_columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def prepare_rows(self, dataset: Any, name: str) -> Any:
        """Tokenises a data set; `name` is the caller's argument that holds it, for messages."""

    @abstractmethod
    def losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns `[n]` losses, one per element of `rows_of`, and detached predictions `[B, ...]`; tallies metrics."""

    # --- Data ---

    def tokenised(self, dataset: Any, name: str) -> Any:
        """`prepare_rows` of a data set, of each in a mapping of them, or of None."""
        if name == "train_dataset":
            self._trl_source = source_name(dataset)
        if dataset is None or isinstance(dataset, PreparedRows):
            return dataset
        if isinstance(dataset, Mapping):
            return {key: self.tokenised(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        return self.prepare_rows(dataset, name)

    def prepared(self, dataset: Any, name: str) -> Any:
        """Returns a data set that was given to `evaluate` or `predict` as the constructor's are."""
        return self.tokenised(dataset, name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.row_columns)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; a data set is prepared as the constructor's are."""
        if not isinstance(eval_dataset, str):
            eval_dataset = self.prepared(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.predict`; predictions are `[N, 2]`, of the chosen and of the rejected response."""
        return super().predict(self.prepared(test_dataset, "test_dataset"), *args, **kwargs)

    # --- Loss ---

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Counts the rows of an optimizer step on all processes."""
        rows = sum(self.rows_of(batch) for batch in batch_samples)
        return sum_over_processes(self.accelerator, torch.tensor([rows], device=device))

    def rows_of(self, batch: Mapping[str, Any]) -> int:
        """Returns the number of losses of a collated batch: its rows of the data set."""
        return len(batch["label"]) if "label" in batch else len(batch["input_ids"]) // 2

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the mean of `losses`, and with `return_outputs` the predictions."""
        with self.accelerator.autocast():
            losses, predictions = self.losses(model, inputs)
        if not self.model.training:
            self.tally({"loss": mean_of(losses)})
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # the gradients of several processes are averaged
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch.squeeze()
        return (loss, predictions) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the loss, predictions and their labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self._trl_passes().passes():
            loss, predictions = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, predictions, self.prediction_labels(inputs, predictions)

    def prediction_labels(self, inputs: Mapping[str, Any], predictions: Tensor) -> Tensor:
        """Returns the labels of predictions `[B, 2]`: 0, since the first response is the better one."""
        return predictions.new_zeros(len(predictions), dtype=torch.int64)


def mean_of(values: Tensor, mask: Tensor | None = None) -> Tally:
    """A metric that is the mean of `[B]` values, or of those where `mask` `[B]` is True."""
    return Tally.of(values.detach().float(), torch.ones_like(values, dtype=torch.bool) if mask is None else mask)


def columns_of(dataset: Any) -> set[str] | None:
    """Returns the names of a data set's columns; None for a file, or where they are unknown."""
    if isinstance(dataset, list):
        return set(dataset[0]) if dataset and isinstance(dataset[0], Mapping) else None
    names = getattr(dataset, "column_names", None)
    return None if names is None else set(names)
