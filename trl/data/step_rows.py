"""Rows with a label per step as tokens: the label is at a step's last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.data.pairs import padded
from trl.data.tokenized import IGNORED


def step_row(
    prompt: Sequence[int],
    steps: Sequence[Sequence[int]],
    labels: Sequence[float | None],
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> dict[str, np.ndarray[Any, Any]] | None:
    """Joins a prompt and its steps; a step that is cut off has no label.

    Args:
        prompt: token ids.
        steps: token ids of each step, at least one.
        labels: label of each step, from 0 (wrong) to 1 (right); None leaves the step out of the loss.
        max_length: maximum tokens of the row, which loses its end.
        max_prompt_length: maximum tokens of the prompt, which loses its beginning.
        max_completion_length: maximum tokens of all steps, which lose their end.

    Returns:
        `input_ids` int32 and `labels` float32, -100 everywhere but at the last tokens of steps with a label; None if no
        label is left.
    """
    if max_prompt_length is not None:
        prompt = prompt[max(0, len(prompt) - max_prompt_length) :]
    ids = [token for step in steps for token in step][:max_completion_length]
    targets = np.full(sum(map(len, steps)), IGNORED, np.float32)
    for end, label in zip(np.cumsum([len(step) for step in steps]), labels, strict=True):
        targets[end - 1] = IGNORED if label is None else label
    targets = np.concatenate([np.full(len(prompt), IGNORED, np.float32), targets[: len(ids)]])[:max_length]
    if (targets == IGNORED).all():
        return None
    return {"input_ids": np.asarray([*prompt, *ids][:max_length], np.int32), "labels": targets}


class StepCollator:
    """Pads rows of `input_ids` and `labels` on the right.

    Args:
        pad_token_id: fills padding.
        pad_to_multiple_of: makes the number of columns a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates `B` rows to `input_ids`, `attention_mask` and float32 `labels`, all `[B, T]`; -100 marks no label.

        Raises:
            ValueError: if a row lacks a column.
        """
        for row in rows:
            if not {"input_ids", "labels"} <= row.keys():
                raise ValueError(
                    f"a row has the columns {', '.join(row) or '(none)'}: expected texts in prompt, completions and "
                    "labels, or token ids in input_ids and their labels"
                )
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
        tokens, attention = padded(ids, self.pad_token_id, self.pad_to_multiple_of)
        labels = torch.full(tokens.shape, float(IGNORED))
        for number, row in enumerate(rows):
            labels[number, : len(ids[number])] = torch.as_tensor(row["labels"], dtype=torch.float32)
        return {"input_ids": tokens, "attention_mask": attention, "labels": labels}
