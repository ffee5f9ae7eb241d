"""Formats of rows: what is detected, what is refused and with which words, how chats become texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl.data import formats
from trl.data.formats import DataFormat, detect_format, prepare


class Tokenizer:
    """Renders `<role>content</>`; a generation prompt is `<assistant>`."""

    chat_template = "any"

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: Any = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        thinking: bool = False,
    ) -> str:
        assert not tokenize
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        text = f"[{','.join(tools)}]{text}" if tools else text
        text = text.removesuffix("</>") if continue_final_message else text
        return text + ("<assistant>" + "<think>" * thinking if add_generation_prompt else "")


def said(user: str, *more: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate((user, *more))]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CHATS: dict[str, dict[str, Any]] = {
    "language_modeling": {"messages": said("a", "b")},
    "prompt_only": {"prompt": said("a")},
    "prompt_completion": {"prompt": said("a"), "completion": answer("b")},
    "preference": {"prompt": said("a"), "chosen": answer("b"), "rejected": answer("c")},
    "unpaired_preference": {"prompt": said("a"), "completion": answer("b"), "label": True},
}
TEXTS: dict[str, dict[str, Any]] = {
    "language_modeling": {"text": "a b"},
    "prompt_only": {"prompt": "a"},
    "prompt_completion": {"prompt": "a", "completion": " b"},
    "preference": {"prompt": "a", "chosen": " b", "rejected": " c"},
    "unpaired_preference": {"prompt": "a", "completion": " b", "label": False},
    "stepwise_supervision": {"prompt": "a", "completions": ["b", "c"], "labels": [True, 0.25]},
}
STEPS = TEXTS["stepwise_supervision"]


@pytest.mark.parametrize("kind", TEXTS)
def test_each_kind_is_detected_as_text_and_as_chat(kind: Any) -> None:
    assert detect_format(TEXTS[kind]) == DataFormat(kind, False)
    if kind in CHATS:
        assert detect_format(CHATS[kind] | {"source": "x"}) == DataFormat(kind, True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "a b", "rejected": "a c", "messages": []}, "preference"),
        ({"messages": said("a"), "prompt": "a"}, "language_modeling"),
        ({"text": "a", "label": 1}, "language_modeling"),
        ({"prompt": "a", "label": True}, "prompt_only"),
    ],
)
def test_columns_beside_those_of_a_kind_do_not_confuse_it(row: dict[str, Any], expected: str) -> None:
    assert detect_format(row).kind == expected


def test_unknown_columns_are_refused_with_those_that_were_expected() -> None:
    with pytest.raises(
        ValueError, match=r"train_dataset\[0\] has the columns question, answer, .* expected text or messa"
    ):
        prepare([{"question": "a", "answer": "b"}], "language_modeling", Tokenizer())


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("language_modeling", {"text": "<user>a</><assistant>b</>"}),
        ("prompt_only", {"prompt": "<user>a</><assistant>"}),
        ("prompt_completion", {"prompt": "<user>a</><assistant>", "completion": "b</>"}),
        ("preference", {"prompt": "<user>a</><assistant>", "chosen": "b</>", "rejected": "c</>"}),
        ("unpaired_preference", {"prompt": "<user>a</><assistant>", "completion": "b</>", "label": True}),
    ],
)
def test_chats_are_rendered(kind: Any, texts: dict[str, Any]) -> None:
    prepared = prepare([CHATS[kind] | {"margin": 2}], kind, Tokenizer())
    assert prepared.rendered and prepared.rows == [{"margin": 2} | texts]
    assert formats.apply_chat_template(CHATS[kind], Tokenizer()) == texts
    assert formats.maybe_apply_chat_template(TEXTS[kind], Tokenizer()) == TEXTS[kind]


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_left_as_they_are(kind: Any) -> None:
    prepared = prepare([TEXTS[kind]], kind, Tokenizer())
    assert not prepared.rendered and prepared.rows == [TEXTS[kind]] and prepared.locations == ["train_dataset[0]"]


def test_the_row_gives_the_template_its_tools_and_variables() -> None:
    row = CHATS["prompt_only"] | {"tools": json.dumps(["search"]), "chat_template_kwargs": {"thinking": True}}
    assert prepare([row], "prompt_only", Tokenizer()).rows[0]["prompt"] == "[search]<user>a</><assistant><think>"


def test_a_prompt_that_ends_with_the_assistant_is_left_open() -> None:
    texts = formats.apply_chat_template({"prompt": said("a", "b")}, Tokenizer())
    assert texts == {"prompt": "<user>a</><assistant>b"}
    with pytest.raises(ValueError, match="role 'system'"):
        formats.apply_chat_template({"prompt": [{"role": "system", "content": "a"}]}, Tokenizer())
    with pytest.raises(KeyError, match="chosen, prompt are those of no kind"):
        formats.apply_chat_template({"prompt": said("a"), "chosen": answer("b")}, Tokenizer())


def test_conversations_of_sharegpt_are_messages() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert prepare([row], "language_modeling", Tokenizer()).rows == [{"text": "<user>a</><assistant>b</>"}]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("ab", "ab", "a"),  # one character of each is left
        (" b", " c", ""),
        ("b", "c", ""),
        ("hello world", "hello", "hell"),
    ],
)
def test_the_prompt_is_what_chosen_and_rejected_begin_with(chosen: str, rejected: str, prompt: str) -> None:
    parts = formats.extract_prompt({"chosen": chosen, "rejected": rejected})
    assert parts == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    assert formats.maybe_extract_prompt({"prompt": "p", "chosen": "a", "rejected": "b"})["prompt"] == "p"
    assert formats.maybe_extract_prompt({"text": "a"}) == {"text": "a"}


def test_an_implicit_prompt_of_a_chat_is_split_off_or_kept() -> None:
    row = {"prompt": "a", "chosen": said("a", "b"), "rejected": said("a", "c")}
    split = {"prompt": "<user>a</><assistant>", "chosen": "b</>", "rejected": "c</>"}
    assert prepare([row], "preference", Tokenizer()).rows == [split]
    whole = {"chosen": "<user>a</><assistant>b</>", "rejected": "<user>a</><assistant>c</>"}
    del row["prompt"]
    assert prepare([row], "preference", Tokenizer(), split_prompts=False).rows == [whole]


def test_preference_rows_become_other_kinds() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "id": 1}]
    expected: dict[Any, list[dict[str, Any]]] = {
        "unpaired_preference": [
            {"prompt": "a", "completion": "b", "label": True, "id": 1},
            {"prompt": "a", "completion": "c", "label": False, "id": 1},
        ],
        "prompt_completion": [{"prompt": "a", "completion": "b", "id": 1}],
        "language_modeling": [{"text": "ab", "id": 1}],
        "prompt_only": [{"prompt": "a", "id": 1}],
    }
    for kind, converted in expected.items():
        assert prepare(rows, kind, Tokenizer()).rows == converted
    assert formats.unpair_preference_dataset(rows) == [
        {"prompt": "a", "completion": "b", "label": True, "id": 1},
        {"prompt": "a", "completion": "c", "label": False, "id": 1},
    ]
    bad = {"prompt": "a", "completion": "c", "label": False}
    assert formats.convert(bad, "unpaired_preference", "prompt_completion") == []
    with pytest.raises(
        ValueError, match=r"\[0\] is prompt_completion, .* preference: that needs data of kind preference"
    ):
        prepare([TEXTS["prompt_completion"]], "preference", Tokenizer())


def test_rows_with_labelled_steps_have_a_prompt() -> None:
    assert prepare([STEPS | {"id": 1}], "prompt_only", Tokenizer()).rows == [{"prompt": "a", "id": 1}]
    with pytest.raises(ValueError, match=r"\[0\] is stepwise_supervision, which cannot be used as preference"):
        prepare([STEPS], "preference", Tokenizer())
    with pytest.raises(ValueError, match=r"\[0\], column 'prompt', is .* rows with labelled steps are texts"):
        prepare([STEPS | {"prompt": said("a")}], "stepwise_supervision", Tokenizer())


def test_a_dataset_is_unpaired_column_by_column() -> None:
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    assert formats.maybe_unpair_preference_dataset(dataset)["completion"] == ["b", "b", "c", "c"]
    plain = Dataset.from_list([{"text": "a"}])
    assert formats.maybe_unpair_preference_dataset(plain) is plain
    assert formats.maybe_unpair_preference_dataset([{"text": "a"}]) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("language_modeling", {"text": 17}, r"\[7\], column 'text', is 17 \(int\): expected a text"),
        (
            "language_modeling",
            {"other": "a"},
            r"\[7\] has no column text, but the columns other: .* as train_dataset\[0\]",
        ),
        ("language_modeling", "a b", r"\[7\] is 'a b': expected a mapping"),
        ("prompt_completion", {"prompt": "a", "completion": " "}, r"\[7\], column 'completion', is empty"),
        ("prompt_completion", {"prompt": "a"}, r"\[7\] has no column completion"),
        (
            "prompt_completion",
            CHATS["prompt_completion"],
            r"\[7\], column 'prompt', is \[{.* \(list\): expected a text",
        ),
        (
            "unpaired_preference",
            TEXTS["unpaired_preference"] | {"label": "yes"},
            r"\[7\], column 'label', is 'yes' \(str\)",
        ),
        ("preference", {"prompt": "a", "chosen": "b"}, r"\[7\] has no column rejected"),
        ("stepwise_supervision", {"prompt": "a", "completions": ["b"]}, r"\[7\] has no column labels, but the columns"),
        (
            "stepwise_supervision",
            STEPS | {"labels": [True]},
            r"\[7\] has 2 completions and 1 labels: expected one label per",
        ),
        (
            "stepwise_supervision",
            STEPS | {"completions": [], "labels": []},
            r"\[7\] has 0 completions .* at least one step",
        ),
        (
            "stepwise_supervision",
            STEPS | {"completions": "b"},
            r"\[7\], column 'completions', is 'b' \(str\): expected a list",
        ),
        ("stepwise_supervision", STEPS | {"labels": 1}, r"\[7\], column 'labels', is 1 \(int\): expected a list"),
        (
            "stepwise_supervision",
            STEPS | {"completions": ["b", " "]},
            r"\[7\], column 'completions', step 1, is ' ' \(str\)",
        ),
        (
            "stepwise_supervision",
            STEPS | {"labels": [1, "+"]},
            r"\[7\], column 'labels', step 1, is '\+' \(str\): expected True",
        ),
        ("stepwise_supervision", STEPS | {"labels": [1.5, 1]}, r"\[7\], column 'labels', step 0, is 1.5 \(float\)"),
        (
            "stepwise_supervision",
            STEPS | {"labels": [math.nan, 1]},
            r"\[7\], column 'labels', step 0, is nan \(float\)",
        ),
        (
            "stepwise_supervision",
            STEPS | {"prompt": said("a")},
            r"\[7\], column 'prompt', .* are texts. Render a chat with",
        ),
    ],
)
def test_a_bad_row_is_shown_with_its_remedy(kind: Any, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        prepare([*[TEXTS[kind]] * 7, bad], kind, Tokenizer())
    assert any(remedy in str(caught.value) for remedy in ("expected a mapping", "dataset.filter", "Render a chat"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is empty: expected at least one message"),
        ("hello", r"is 'hello' \(str\): expected a list of messages"),
        ([{"content": "a"}], "message 0 is {'content': 'a'}: expected role and content"),
        ([*said("a"), {"role": "assistant", "content": 5}], r"message 1 has the content 5 \(int\)"),
        (said("a", ""), "message 1 of the assistant is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 0 holds content of type image: only text"),
    ],
)
def test_a_bad_chat_is_shown(messages: Any, message: str) -> None:
    rows = [CHATS["language_modeling"], {"messages": messages}]
    with pytest.raises(ValueError, match=r"train_dataset\[1\], column 'messages', " + message):
        prepare(rows, "language_modeling", Tokenizer())


def test_a_prompt_that_the_template_ends_otherwise_alone_is_refused() -> None:
    row = CHATS["prompt_completion"] | {"chat_template_kwargs": {"thinking": True}}
    with pytest.raises(ValueError, match=r"\[0\]: the rendered prompt is not a prefix .* its end '<think>'.* messages"):
        prepare([row], "prompt_completion", Tokenizer())
    assert formats.apply_chat_template(row, Tokenizer())["prompt"] == "<user>a</><assistant>"


def test_preferences_without_a_common_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0\] has no prompt: chosen and rejected begin differently, with 'a b'"):
        prepare([{"chosen": "a b", "rejected": "c b"}], "preference", Tokenizer())


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = Tokenizer()
    tokenizer.chat_template = ""
    with pytest.raises(
        ValueError, match=r"\[0\] holds chat messages, but the tokenizer has no chat template: .*setup_chat"
    ):
        prepare([CHATS["prompt_only"]], "prompt_only", tokenizer)


def test_rows_come_from_files_and_folders(tmp_path: Path) -> None:
    jsonl, csv = tmp_path / "train.jsonl", tmp_path / "train.csv"
    jsonl.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "completion": ""}\n')
    csv.write_text("text\na\nb\n")
    with pytest.raises(ValueError, match=r"train.jsonl:3 \(row 1\), column 'completion', is empty"):
        prepare(str(jsonl), "prompt_completion", Tokenizer())
    assert prepare(csv, "language_modeling", Tokenizer()).rows == [{"text": "a"}, {"text": "b"}]
    parquet = tmp_path / "train.parquet"
    Dataset.from_list([{"text": "c"}]).to_parquet(parquet)
    assert prepare(str(parquet), "language_modeling", Tokenizer()).rows == [{"text": "c"}]
    with pytest.raises(ValueError, match=r"train_dataset='.*missing.csv' does not exist"):
        prepare(tmp_path / "missing.csv", "language_modeling", Tokenizer())
    with pytest.raises(
        ValueError, match=r"train_dataset='.*nowhere' is neither a file nor a data set with a split train"
    ):
        prepare(str(tmp_path / "nowhere"), "language_modeling", Tokenizer())
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        prepare([], "language_modeling", Tokenizer(), name="eval_dataset")
