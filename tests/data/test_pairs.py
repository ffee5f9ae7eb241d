from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import EOS, PAD, tiny_tokenizer
from trl.data.pairs import AnswerCollator, LengthLimits, prompts_and_answers, rows_within, token_ids


def characters() -> Any:
    """A tokenizer of single letters that merges "ab" into one token."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [("a", "b")])), eos_token="<eos>")


@pytest.mark.parametrize(
    ("limits", "prompt", "answer"),
    [
        (LengthLimits(), [1, 2, 3], [4, 5]),
        (LengthLimits(total=5), [1, 2, 3], [4, 5]),
        (LengthLimits(total=4), [1, 2, 3], [4]),
        (LengthLimits(total=3), [1, 2, 3], []),
        (LengthLimits(total=2), [1, 2, 3], []),
        (LengthLimits(total=4, mode="keep_end"), [2, 3], [4, 5]),
        (LengthLimits(total=1, mode="keep_end"), [], [5]),
        (LengthLimits(prompt=2), [1, 2], [4, 5]),
        (LengthLimits(prompt=2, mode="keep_end"), [2, 3], [4, 5]),
        (LengthLimits(prompt=7, mode="keep_end"), [1, 2, 3], [4, 5]),
        (LengthLimits(prompt=2, total=3, mode="keep_end"), [3], [4, 5]),
        (LengthLimits(answer=1), [1, 2, 3], [4]),
    ],
)
def test_cut(limits: LengthLimits, prompt: list[int], answer: list[int]) -> None:
    assert limits.cut([1, 2, 3], [4, 5]) == (prompt, answer)


def test_texts_end_once() -> None:
    tokenizer = tiny_tokenizer()
    assert token_ids(tokenizer, ["w5 w6", "w7 w1"], rendered=False, end=True) == [[5, 6, EOS], [7, EOS]]
    assert token_ids(tokenizer, ["w5 w6"], rendered=True, end=True) == [[5, 6]]
    assert token_ids(tokenizer, [], rendered=False, end=True) == []


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token to end a text with: set tokenizer"):
        token_ids(tokenizer, ["w5"], rendered=False, end=True)


def test_answers_share_their_prompt() -> None:
    prompts, (chosen, rejected) = prompts_and_answers(
        tiny_tokenizer(), ["w5 w6", "w7"], [[" w8", " w9 w8"], [" w4", " w5"]], rendered=False
    )
    assert prompts == [[5, 6], [7]]
    assert chosen == [[8, EOS], [9, 8, EOS]]
    assert rejected == [[4, EOS], [5, EOS]]


def test_a_token_across_the_boundary_belongs_to_both_answers(caplog: pytest.LogCaptureFixture) -> None:
    """ "ca" + "b" is c, ab: the prompt that both answers share is c."""
    with caplog.at_level(logging.WARNING):
        prompts, (chosen, rejected) = prompts_and_answers(characters(), ["ca"], [["b"], ["c"]], rendered=False)
    assert prompts == [[3]]
    assert chosen == [[4, 0]] and rejected == [[1, 3, 0]]
    assert "1 of 1 prompts end inside a token" in caplog.text and "'ca' loses 'a'" in caplog.text


def test_rows_of_which_nothing_is_left(caplog: pytest.LogCaptureFixture) -> None:
    columns = {
        "prompt_ids": [[1, 2], [1, 2, 3, 4]],
        "chosen_ids": [[5, 6, 7], [5]],
        "rejected_ids": [[8], [9]],
        "margin": [0.5, 0.25],
    }
    with caplog.at_level(logging.WARNING):
        (row,) = rows_within(columns, LengthLimits(total=4), ["chosen_ids", "rejected_ids"], name="train_dataset")
    assert {name: np.asarray(value).tolist() for name, value in row.items()} == {
        "prompt_ids": [1, 2], "chosen_ids": [5, 6], "rejected_ids": [8], "margin": 0.5,
    }  # fmt: skip
    assert "train_dataset: 1 of 2 rows are left out as too long for max_length=4" in caplog.text
    with pytest.raises(ValueError, match="each of the 2 rows of train_dataset is too long for max_length=2"):
        rows_within(columns, LengthLimits(total=2), ["chosen_ids"], name="train_dataset")


def test_both_answers_get_the_shorter_prompt() -> None:
    columns = {"prompt_ids": [[1, 2, 3]], "chosen_ids": [[4, 5]], "rejected_ids": [[6]]}
    limits = LengthLimits(total=4, mode="keep_end")
    (row,) = rows_within(columns, limits, ["chosen_ids", "rejected_ids"], name="train_dataset")
    assert row["prompt_ids"].tolist() == [2, 3]


def test_a_batch_by_hand() -> None:
    rows = [
        {"prompt_ids": np.array([5, 6]), "chosen_ids": [7], "rejected_ids": [8, 9], "margin": 1},
        {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2], "margin": 0.5},
    ]
    batch = AnswerCollator(["chosen_ids", "rejected_ids"], pad_token_id=PAD, floats=["margin", "score"])(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [4, 3, 0, 0], [5, 6, 8, 9], [4, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert batch["margin"].tolist() == [1.0, 0.5] and batch["margin"].dtype == torch.float32
    assert "score" not in batch


def test_a_batch_of_an_encoder_decoder_by_hand() -> None:
    collate = AnswerCollator(["completion_ids"], pad_token_id=PAD, decoder_start=9, pad_to_multiple_of=4)
    batch = collate([{"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": True}])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[9, 7, 8, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0]]
    assert batch["label"].tolist() == [True]
