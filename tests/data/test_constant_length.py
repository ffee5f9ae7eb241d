"""`ConstantLengthDataset` as TRL 0.4.6 has it: pieces of equal length from joined texts."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from tests.helpers import EOS, tiny_tokenizer
from trl.data.constant_length import ConstantLengthDataset

ROWS = [{"text": "w5 w6 w7"}, {"text": "w8"}, {"text": "w9 w40"}]  # joined: 5 6 7 | 8 | 9 40, each followed by w1


def pieces(rows: Any = ROWS, **settings: Any) -> list[list[int]]:
    data = ConstantLengthDataset(tiny_tokenizer(), rows, **({"dataset_text_field": "text", "seq_length": 4} | settings))
    found = []
    for piece in islice(data, 20):
        assert piece["input_ids"].tolist() == piece["labels"].tolist()
        found.append(piece["input_ids"].tolist())
    return found


def test_texts_are_joined_and_cut() -> None:
    assert pieces(shuffle=False) == [[5, 6, 7, EOS], [8, EOS, 9, 40]]  # what does not fill a piece is dropped
    assert pieces(shuffle=False, append_concat_token=False) == [[5, 6, 7, 8]]
    assert pieces(formatting_func=lambda row: row["text"] + " w41", shuffle=False)[0] == [5, 6, 7, 41]


def test_length_and_settings_are_those_of_0_4_6() -> None:
    data = ConstantLengthDataset(tiny_tokenizer(), ROWS, dataset_text_field="text")
    assert len(data) == 3 and data.seq_length == 1024 and data.infinite is False
    assert data.max_buffer_size == 1024 * 3.6 * 1024 and data.concat_token_id == EOS and data.current_size == 0


def test_an_infinite_one_begins_again() -> None:
    assert len(pieces(infinite=True, num_of_sequences=1, chars_per_token=1)) == 20
    assert pieces([], infinite=True) == []


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    rows = [{"text": f"w{i} w{i} w{i}"} for i in range(40, 61)]
    data = ConstantLengthDataset(tiny_tokenizer(), rows, dataset_text_field="text", seq_length=4)
    first, again = ([p["input_ids"].tolist() for p in data] for _ in range(2))
    assert first == again and sorted(first) != first
    data.set_epoch(1)
    assert [p["input_ids"].tolist() for p in data] not in (first, sorted(first))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="needs dataset_text_field or formatting_func"):
        ConstantLengthDataset(tiny_tokenizer(), ROWS)
    with pytest.raises(ValueError, match=r"dataset\[0\]: the text is 7 \(int\): expected a str from text"):
        pieces([{"text": 7}])
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="joined by token 4"):
        data = ConstantLengthDataset(tokenizer, ROWS, dataset_text_field="text", eos_token_id=4)
    assert data.concat_token_id == 4
    with pytest.warns(UserWarning, match="more than one argument"):
        ConstantLengthDataset(tiny_tokenizer(), ROWS, formatting_func=lambda a, b: "")  # type: ignore[arg-type, misc]
