"""Rows of a batch keep their order and their padding."""

from __future__ import annotations

import torch

from trl.training.batch import Batch


def test_rows_in_any_order_and_more_than_once() -> None:
    queries = [torch.tensor([1]), torch.tensor([2, 3])]
    responses = [torch.tensor([4]), torch.tensor([5])]
    inputs = {"input_ids": torch.tensor([[0, 1, 4], [2, 3, 5]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    batch = Batch(queries=queries, responses=responses, inputs=inputs, is_encoder_decoder=False)
    rows = batch.rows(torch.tensor([1, 0, 1]))
    assert [query.tolist() for query in rows.queries] == [[2, 3], [1], [2, 3]]
    assert [response.tolist() for response in rows.responses] == [[5], [4], [5]]
    assert rows.inputs["input_ids"].tolist() == [[2, 3, 5], [0, 1, 4], [2, 3, 5]]
    assert rows.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1], [1, 1, 1]]
