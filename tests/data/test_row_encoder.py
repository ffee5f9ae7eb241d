"""Rows become tokens, and what counts in the loss is marked: expected ids are written out."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.helpers import EOS, tiny_tokenizer
from trl.data.formats import DataFormat
from trl.data.row_encoder import RowEncoder

USER, ASSISTANT = 50, 51
TURN = "w5{{ '0' if m['role'] == 'user' else '1' }} {{ m['content'] }} w1 "
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}w51 {% endif %}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w50 {{ m['content'] }} w1 {% else %}w51 {% generation %}"
    "{{ m['content'] }} w1{% endgeneration %} {% endif %}{% endfor %}"
)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encoder(template: str | None = TEMPLATE, **settings: Any) -> RowEncoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return RowEncoder(tokenizer=tokenizer, **settings)


def encoded(rows: list[Any], template: str | None = TEMPLATE, **settings: Any) -> list[tuple[list[int], list[int]]]:
    located = [(f"train_dataset[{i}]", row) for i, row in enumerate(rows)]
    return [
        (list(t.ids), [i for i, counted in enumerate(t.counted) if counted])
        for t in encoder(template, **settings)(located)
    ]


def test_texts_end_once() -> None:
    assert encoded([{"text": "w5 w6"}, {"text": "w5 w1"}]) == [([5, 6, EOS], [0, 1, 2]), ([5, EOS], [0, 1])]


def test_the_completion_alone_counts_unless_told_otherwise() -> None:
    row = {"prompt": "w5 w6", "completion": " w7"}
    assert encoded([row]) == [([5, 6, 7, EOS], [2, 3])]
    assert encoded([row], completion_only=False) == [([5, 6, 7, EOS], [0, 1, 2, 3])]
    tokens = next(encoder(separate_prompts=True)([("row", row)]))
    assert (tokens.prompt, tokens.ids, tokens.counted) == ([5, 6], [7, EOS], [True, True])


def test_chats_are_as_the_template_renders_them() -> None:
    assert encoded([{"messages": chat("w5", "w6")}]) == [([USER, 5, EOS, ASSISTANT, 6, EOS], list(range(6)))]
    row = {"prompt": chat("w5"), "completion": [{"role": "assistant", "content": "w6"}]}
    assert encoded([row]) == [([USER, 5, EOS, ASSISTANT, 6, EOS], [4, 5])]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistant_alone_counts_with_and_without_marks_in_the_template(template: str) -> None:
    ids = [USER, 5, EOS, ASSISTANT, 6, 7, EOS, USER, 8, EOS, ASSISTANT, 9, EOS]
    rows = [{"messages": chat("w5", "w6 w7", "w8", "w9")}]
    assert encoded(rows, template, assistant_only=True) == [(ids, [4, 5, 6, 11, 12])]


def test_of_a_completion_the_assistants_part_counts() -> None:
    row = {"prompt": chat("w5", "w6", "w7"), "completion": chat("w7", "w8", "w9")[1:]}
    ids = [USER, 5, EOS, ASSISTANT, 6, EOS, USER, 7, EOS, ASSISTANT, 8, EOS, USER, 9, EOS]
    assert encoded([row], assistant_only=True) == [(ids, [10, 11])]


def test_rows_of_token_ids() -> None:
    rows = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [0, 0, 1]},
        {"input_ids": [0, 6, 7], "attention_mask": [0, 1, 1]},
    ]
    assert encoded(rows) == [([5, 6, 7], [0, 1, 2]), ([5, 6, 7], [1]), ([5, 6, 7], [2]), ([6, 7], [0, 1])]


@pytest.mark.parametrize(("keep", "ids", "counted"), [("start", [5, 6, 7], [2]), ("end", [7, 8, EOS], [0, 1, 2])])
def test_long_rows_are_truncated(keep: Any, ids: list[int], counted: list[int]) -> None:
    row = {"prompt": "w5 w6", "completion": " w7 w8"}
    assert encoded([row], max_length=3, keep=keep) == [(ids, counted)]


def test_rows_without_a_counted_token_are_left_out() -> None:
    encode = encoder(max_length=2)
    rows = [("a", {"prompt": "w5 w6", "completion": " w7"}), ("b", {"prompt": "w5", "completion": " w7"})]
    assert [t.location for t in encode(rows)] == ["b"] and encode.dropped == 1


def test_a_function_makes_the_text_of_a_row_or_of_many() -> None:
    rows = [{"a": "w5"}, {"a": "w6"}]
    assert encoded(rows, formatting=lambda row: row["a"] + " w9") == [
        ([5, 9, EOS], [0, 1, 2]),
        ([6, 9, EOS], [0, 1, 2]),
    ]
    batched = encoded(rows, formatting=lambda batch: [f"{a} w8" for a in batch["a"]], formatting_batches=True)
    assert [ids for ids, _ in batched] == [[5, 8, EOS], [6, 8, EOS]]
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: formatting_func returned \['w5'\] \(list\)"):
        encoded(rows, formatting=lambda row: [row["a"]])
    with pytest.raises(ValueError, match=r"formatting_func returned 'w5' \(str\) for 2 rows"):
        encoded(rows, formatting=lambda batch: "w5", formatting_batches=True)


def test_a_named_field_is_the_text_whatever_the_other_columns_are() -> None:
    row = {"prompt": "w5", "completion": "w6", "story": "w7"}
    named = {"text_field": "story", "expected": DataFormat("language_modeling", False)}
    assert encoded([row], **named) == [([7, EOS], [0, 1])]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"text": "w5"}],
            {"completion_only": True},
            r"completion_only_loss=True, but train_dataset\[0\] is language_mod",
        ),
        ([{"text": "w5"}], {"assistant_only": True}, r"assistant_only_loss=True, but .* needs chat messages"),
        ([{"text": "w5"}], {"separate_prompts": True}, "an encoder-decoder reads a prompt"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {},
            r"is preference \(text\): supervised fine-tuning takes",
        ),
        ([{"prompt": "a", "completion": "b", "label": True}], {}, "unpaired_preference .* for example label"),
        ([{"messages": chat("w5")}], {"assistant_only": True}, r"\[0\] has no message of the assistant"),
        ([{"input_ids": [5, "a"]}], {}, r"\[0\], column 'input_ids', is \[5, 'a'\]"),
        ([{"input_ids": [5]}, {"text": "w5"}], {}, r"\[1\] has no column input_ids"),
        ([{"input_ids": [5, 6], "labels": [5, 7]}], {}, r"\[0\] has the label 7 at a token 6"),
        ([{"input_ids": [5, 6], "labels": [5]}], {}, r"has 2 input_ids, but 1 labels"),
        ([{"input_ids": [5, 6]}], {"completion_only": True}, "has neither labels nor completion_mask"),
        ([{"input_ids": [5, 6]}], {"assistant_only": True}, "has neither labels nor assistant_masks"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(rows: list[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(rows, **settings)


def test_a_template_that_renders_answers_differently_later_is_refused() -> None:
    thinking = "{% for m in messages %}" + TURN + "{{ 'w40 ' if loop.last else '' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"\[0\]: the chat template renders message 1 differently .* generation"):
        encoded([{"messages": chat("w5", "w6", "w7", "w8")}], thinking, assistant_only=True)


def test_a_token_across_the_boundary_is_mentioned_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trl"):
        got = encoded([{"prompt": "w5 w4", "completion": "0"}] * 2)
    assert got == [([5, 40, EOS], [1, 2])] * 2
    assert [r.message for r in caplog.records if "another token in front of the completion" in r.message] != []
    assert len(caplog.records) == 1
