"""Rows with a label per step as tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl.data.step_rows import StepCollator, step_row

X = -100.0
STEPS = [[11, 12, 13], [21], [31, 32]]
LABELS = [1.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("limits", "ids", "labels"),
    [
        ({}, [1, 2, 11, 12, 13, 21, 31, 32], [X, X, X, X, 1.0, 0.0, X, 0.25]),
        ({"max_prompt_length": 1}, [2, 11, 12, 13, 21, 31, 32], [X, X, X, 1.0, 0.0, X, 0.25]),
        ({"max_completion_length": 5}, [1, 2, 11, 12, 13, 21, 31], [X, X, X, X, 1.0, 0.0, X]),
        ({"max_length": 5}, [1, 2, 11, 12, 13], [X, X, X, X, 1.0]),
        ({"max_length": 6, "max_prompt_length": 0}, [11, 12, 13, 21, 31, 32], [X, X, 1.0, 0.0, X, 0.25]),
    ],
)
def test_labels_are_at_the_ends_of_steps(limits: dict[str, int], ids: list[int], labels: list[float]) -> None:
    row = step_row([1, 2], STEPS, LABELS, **limits)
    assert row is not None and (row["input_ids"].tolist(), row["labels"].tolist()) == (ids, labels)


def test_steps_without_a_label() -> None:
    row = step_row([], STEPS, [None, None, 1.0])
    assert row is not None and row["labels"].tolist() == [X, X, X, X, X, 1.0]
    assert step_row([1, 2], STEPS, LABELS, max_length=4) is None
    assert step_row([1, 2], STEPS, [None, None, 1.0], max_completion_length=4) is None


def test_batches() -> None:
    rows: list[Any] = [{"input_ids": [5, 6], "labels": [-100, 1]}, step_row([1], STEPS[:1], [0.5])]
    batch = StepCollator(7, pad_to_multiple_of=5)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 7, 7], [1, 11, 12, 13, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[X, 1.0, X, X, X], [X, X, X, 0.5, X]]
    assert batch["labels"].dtype == torch.float32
    with pytest.raises(ValueError, match="a row has the columns input_ids: expected texts in prompt, completions"):
        StepCollator(0)([{"input_ids": [1]}])
