"""Rows of a batch keep their order and their padding."""

from __future__ import annotations

from dataclasses import replace

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
    masked = replace(batch, response_masks=[torch.tensor([0]), torch.tensor([1])]).rows(torch.tensor([1, 0, 1]))
    assert masked.rollout().mask.tolist() == [[False, True], [False, False], [False, True]]


def test_a_rollout_knows_where_responses_are_and_who_shares_a_query() -> None:
    queries = [torch.tensor([1]), torch.tensor([2, 3]), torch.tensor([1])]
    responses = [torch.tensor([4, 6]), torch.tensor([5]), torch.tensor([7])]
    tokens = torch.tensor([[1, 4, 6], [2, 3, 5], [1, 7, 0]])
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]])}
    batch = Batch(queries=queries, responses=responses, inputs=inputs, is_encoder_decoder=False)
    batch = replace(batch, response_masks=[torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([1])])
    rollout = batch.rollout()
    assert rollout.mask.tolist() == [[False, True], [False, True], [True, False]]
    group = rollout.group.tolist()
    assert group[0] == group[2] != group[1]
    assert batch.place([torch.tensor([0.5, 2.0]), torch.tensor([3.0]), torch.tensor([4.0])]).tolist() == [
        [0.5, 2.0], [0.0, 3.0], [4.0, 0.0],
    ]  # fmt: skip


def test_an_encoder_decoder_s_start_token_is_not_predicted() -> None:
    queries, responses = [torch.tensor([8, 9])], [torch.tensor([0, 4, 6])]
    inputs = {
        "input_ids": torch.tensor([[8, 9]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "decoder_input_ids": torch.tensor([[0, 4, 6]]),
        "decoder_attention_mask": torch.tensor([[1, 1, 1]]),
    }
    batch = Batch(queries=queries, responses=responses, inputs=inputs, is_encoder_decoder=True)
    assert batch.place([torch.tensor([7.0, 1.0, 2.0])]).tolist() == [[1.0, 2.0]]
    rollout = batch.rollout()
    assert rollout.mask.tolist() == [[True, True]] and rollout.encoder_tokens is not None
