"""Batches of labelled rows, and the loss on what follows a template."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from tests.helpers import EOS, PAD, tiny_tokenizer
from trl.data.sequence_collators import DataCollatorForCompletionOnlyLM, SequenceCollator

ROWS: list[dict[str, Any]] = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}]


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in batch.items()}


def test_padded() -> None:
    assert lists(SequenceCollator(PAD)(ROWS)) == {
        "input_ids": [[5, 6, 7], [8, 9, PAD]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [8, 9, -100]],
    }
    batch = SequenceCollator(PAD, multiple=4, side="left")(ROWS)
    assert batch["input_ids"].tolist() == [[PAD, 5, 6, 7], [PAD, PAD, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, 8, 9]]


def test_joined() -> None:
    assert lists(SequenceCollator(PAD, join=True)(ROWS)) == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[-100, 6, 7, -100, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
    }
    packed = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "seq_lengths": [2, 1]},
        {**ROWS[1], "seq_lengths": [2]},
    ]
    assert SequenceCollator(PAD)(packed)["position_ids"].tolist() == [[0, 1, 0, 0, 1]]


def test_for_an_encoder_decoder() -> None:
    rows = [{"prompt_ids": [5], **ROWS[0]}, {"prompt_ids": [6, 7], **ROWS[1]}]
    assert lists(SequenceCollator(PAD)(rows)) == {
        "input_ids": [[5, PAD], [6, 7]],
        "attention_mask": [[1, 0], [1, 1]],
        "labels": [[-100, 6, 7], [8, 9, -100]],
    }


TEXT = [5, 42, 43, 6, EOS, 44, 7, 42, 43, 8, EOS]  # w42 w43 precede an answer, w44 an instruction


def labels(ids: list[int], *templates: Any, **settings: Any) -> list[int]:
    collate = DataCollatorForCompletionOnlyLM(*templates, tokenizer=tiny_tokenizer(), **settings)
    row: list[int] = collate([{"input_ids": ids}])["labels"][0].tolist()
    return row


def counted(ids: list[int], *templates: Any) -> list[int]:
    return [i for i, label in enumerate(labels(ids, *templates)) if label == ids[i]]


@pytest.mark.parametrize("template", ["w42 w43", [42, 43]])
def test_what_follows_the_last_response_template_counts(template: Any) -> None:
    assert counted(TEXT, template) == [9, 10]  # an end of sequence counts


@pytest.mark.parametrize(("response", "instruction"), [("w42 w43", "w44"), ([42, 43], [44])])
def test_each_answer_counts_up_to_the_next_instruction(response: Any, instruction: Any) -> None:
    assert counted(TEXT, response, instruction) == [3, 4, 9, 10]


def test_padding_does_not_count_even_where_it_is_the_end_token() -> None:
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    collate = DataCollatorForCompletionOnlyLM("w42", tokenizer, mlm=False)  # the tokenizer's place in TRL 0.4.6
    assert isinstance(collate, DataCollatorForLanguageModeling)
    batch = collate([{"input_ids": [42, 5, EOS]}, [42, 6]])
    assert lists(batch) == {
        "input_ids": [[42, 5, EOS], [42, 6, EOS]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 5, EOS], [-100, 6, -100]],
    }
    joined = DataCollatorForCompletionOnlyLM("w42", tokenizer=tokenizer, padding_free=True)([[42, 5], [42, 6]])
    assert joined["position_ids"].tolist() == [[0, 1, 0, 1]] and joined["labels"].tolist() == [[-100, 5, -100, 6]]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        (("w40",), r"text 0 of the batch has no response_template 'w40' \(token ids \[40\]\): 'w5 w42 .* truncated"),
        (("w42", "w41"), r"text 0 of the batch has no instruction_template 'w41'"),
        (("w4",), r"the text has it, but as other tokens"),
    ],
)
def test_a_template_that_is_not_found_shows_the_text(templates: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        labels(TEXT, *templates)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("w42",), {}, "needs the tokenizer"),
        (("w42", None, tiny_tokenizer(), True), {}, "mlm=True is not supported"),
        (("w42",), {"tokenizer": tiny_tokenizer(), "ignore_index": -1}, "ignore_index=-1 is not supported"),
        (("w42",), {"tokenizer": tiny_tokenizer(pad=False)}, "no pad token"),
        (("",), {"tokenizer": tiny_tokenizer()}, "response_template='' must be a text or a list of token ids"),
        (("w42", None, tiny_tokenizer(), False, 7), {}, "1 more arguments"),
    ],
)
def test_unsupported_arguments(arguments: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorForCompletionOnlyLM(*arguments, **settings)


def test_tensors_alone_are_returned() -> None:
    collate = DataCollatorForCompletionOnlyLM("w42", tokenizer=tiny_tokenizer())
    assert torch.is_tensor(collate([[42, 5]], return_tensors="pt")["labels"])
    with pytest.raises(ValueError, match="return_tensors='np'"):
        collate([[42, 5]], return_tensors="np")
