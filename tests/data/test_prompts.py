from __future__ import annotations

import copy
import datetime
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import tiny_tokenizer
from trl.data import Prompt, column_fingerprints, fingerprint, load_prompts

TEMPLATE = (
    "{% for m in messages %}{{ 'w40 ' if m.role == 'user' else 'w41 ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w42{% endif %}"
)


def tokenizer(chat: bool = False) -> Any:
    made = tiny_tokenizer()
    if chat:
        made.chat_template = TEMPLATE
    return made


def load(source: Any, **settings: Any) -> list[Prompt]:
    return load_prompts(source, tokenizer(), **settings)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_texts() -> None:
    first, second = load(["w5 w6", "w7"])
    assert (first.id, first.text, first.columns) == ("0", "w5 w6", {})
    assert first.tokens.tolist() == [5, 6] and first.tokens.dtype == torch.int64
    assert (second.id, second.tokens.tolist()) == ("1", [7])


class Stream(torch.utils.data.IterableDataset):
    """Of torch: no length, no order but its own."""

    def __iter__(self) -> Any:
        return iter(["w5 w6", {"prompt": "w7", "answer": 3}])


def rows() -> Any:
    yield "w5 w6"
    yield {"prompt": "w7", "answer": 3}


@pytest.mark.parametrize("source", [rows, Stream, lambda: iter(list(rows())), lambda: dict(enumerate(rows())).values()])
def test_streams_are_read_to_their_end(source: Any) -> None:
    assert fingerprint(load(source())) == fingerprint(load(["w5 w6", "w7"]))
    assert [prompt.columns for prompt in load(source())] == [{"answer": None}, {"answer": 3}]


def test_an_iterable_dataset_of_the_hub() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"prompt": ["w5 w6", "w7", "w8"], "n": [1, 2, 3]})
    stream = table.to_iterable_dataset()
    assert fingerprint(load(stream)) == fingerprint(load(table))
    assert [prompt.columns for prompt in load(stream)] == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [prompt.tokens.tolist() for prompt in load(stream.take(2))] == [[5, 6], [7]]
    # A stream that has a position of its own is read from there.
    iterator = iter(stream)
    next(iterator)
    later = table.to_iterable_dataset()
    later.load_state_dict(stream.state_dict())
    assert [prompt.text for prompt in load(later)] == ["w7", "w8"]


def test_an_endless_stream_is_refused() -> None:
    reason = r"a stream \(repeat\) of more than max_streamed=1000 rows and may be infinite.*itertools\.islice"
    with pytest.raises(ValueError, match=reason):
        load(itertools.repeat("w5"), max_streamed=1000)
    assert len(load(itertools.repeat("w5", 1000), max_streamed=1000)) == 1000
    assert len(load(["w5"] * 20, max_streamed=10)) == 20  # a list has an end


@pytest.mark.parametrize("tokens", [[5, 6], torch.tensor([5, 6]), np.array([5, 6], dtype=np.int32), (5, 6)])
def test_token_ids(tokens: Any) -> None:
    (prompt,) = load([tokens])
    assert (prompt.text, prompt.tokens.tolist(), prompt.tokens.dtype) == ("w5 w6", [5, 6], torch.int64)


def test_chat_goes_through_the_models_template_up_to_where_it_speaks() -> None:
    chat = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    (prompt,) = load_prompts([chat], tokenizer(chat=True))
    assert prompt.text == "w40 w5 w41 w6 w40 w7 w42"
    assert prompt.tokens.tolist() == [40, 5, 41, 6, 40, 7, 42]


def test_special_tokens_are_added_to_texts_and_not_to_rendered_chats() -> None:
    from tokenizers.processors import TemplateProcessing

    with_bos = tokenizer(chat=True)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    text, chat = load_prompts(["w5", user("w5")], with_bos)
    assert text.tokens.tolist() == [2, 5]
    assert chat.tokens.tolist() == [40, 5, 42]


def test_rows_of_columns() -> None:
    rows = [{"prompt": "w5", "label": 1, "id": 70}, {"query": [6, 7], "id": "b"}, {"messages": user("w8"), "id": "c"}]
    first, second, third = load_prompts(rows, tokenizer(chat=True))
    assert [p.id for p in (first, second, third)] == ["70", "b", "c"]
    assert [p.tokens.tolist() for p in (first, second, third)] == [[5], [6, 7], [40, 8, 42]]
    assert first.columns == {"label": 1, "id": 70}
    assert second.columns == {"label": None, "id": "b"}


def test_prompt_comes_before_query_and_messages() -> None:
    (prompt,) = load([{"messages": user("w9"), "query": "w6", "prompt": "w5", "prompt_id": "x", "id": "y"}])
    assert prompt.text == "w5" and prompt.id == "x"
    assert set(prompt.columns) == {"messages", "query", "prompt_id", "id"}


def test_prompts_may_be_given_again() -> None:
    prompts = load([{"prompt": "w5 w6", "label": 1}])
    (again,) = load(prompts)
    assert (again.id, again.text, again.columns) == ("0", "w5 w6", {"label": 1})
    with pytest.raises(ValueError, match="max_tokens=1"):
        load(prompts, max_tokens=1)


def test_dataset_in_whatever_format() -> None:
    import datasets

    rows = {"query": ["w5", "w6 w7"], "label": [1, 0], "input_ids": [[5], [6, 7]]}
    dataset = datasets.Dataset.from_dict(rows)
    dataset.set_format("torch", columns=["input_ids"])
    first, second = load(dataset)
    assert second.text == "w6 w7" and second.columns == {"label": 0, "input_ids": [6, 7]}
    with pytest.raises(
        ValueError, match="a DatasetDict with the keys train, not a list of rows: pass one of its splits"
    ):
        load(datasets.DatasetDict(train=dataset))


def test_files_of_every_kind_say_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "w5 w6", "topic": "a,b"}, {"prompt": "w7", "topic": 'say "é"\nw9'}]
    jsonl = tmp_path / "p.jsonl"
    # With a byte-order mark, an empty line, and none at the end.
    jsonl.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    csv = tmp_path / "p.CSV"
    csv.write_bytes('prompt,topic\r\nw5 w6,"a,b"\r\n\r\nw7,"say ""é""\nw9"\r\n'.encode())
    parquet = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    expected = [("0", "w5 w6", [5, 6], "a,b"), ("1", "w7", [7], 'say "é"\nw9')]
    for path in (jsonl, str(csv), parquet):
        found = [(p.id, p.text, p.tokens.tolist(), p.columns["topic"]) for p in load(path)]
        assert found == expected, path


def test_separators_within_a_json_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "w5\u2028w6"}\n"w7"\n', encoding="utf-8")
    assert [p.text for p in load(path)] == ["w5\u2028w6", "w7"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("p.jsonl", b'{"prompt": "w5"}\n\n{"prompt": }\n', r"p\.jsonl:3 \(row 1\) is not valid JSON: .* at column 12"),
        ("p.jsonl", b'"w5"\n"\xff"\n', r"p\.jsonl:2 \(row 1\) is not valid UTF-8"),
        ("p.jsonl", b'"w5"\n' + b"[" * 100_000 + b"\n", r"p\.jsonl:2 \(row 1\) is nested too deeply"),
        (
            "p.jsonl",
            b'"w5"\n{"text": "w6"}\n',
            r"p\.jsonl:2 \(row 1\) has the columns text: one of them must be prompt",
        ),
        ("p.jsonl", b'"w5"\n{"prompt": null}\n', r"p\.jsonl:2 \(row 1\), column 'prompt', is None"),
        ("p.jsonl", b'"w5"\n17\n', r"p\.jsonl:2 \(row 1\) is of type int"),
        ("p.jsonl", b"\n", "there are no prompts"),
        ("p.csv", b"", "there are no prompts"),
        ("p.csv", b"prompt,a\nw5,1\nw6\n", r"p\.csv:3 \(row 1\) has 1 cells, but the header has 2: prompt, a"),
        ("p.csv", b"prompt,prompt\nw5,1\n", r"p\.csv:1 has duplicate column names: prompt, prompt"),
        ("p.csv", b'prompt,a\n"w5\nw5",1\nw6,"1"2\n', r"p\.csv:4 is not valid CSV"),
        ("p.csv", b"prompt\nw5\n\xff\n", r"p\.csv:\d+ or a line shortly after it is not valid UTF-8"),
        ("p.csv", b"prompt,a\nw5,1\n,2\n", r"p\.csv:3 \(row 1\), column 'prompt', is an empty string"),
        ("p.parquet", b"PAR1 no", r"p\.parquet is not a valid Parquet file"),
        ("p.txt", b"w5\n", r"is not a path to one of \.jsonl"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ([], "there are no prompts"),
        ("w5 w6", "pass a single row in a list"),
        ("gone.jsonl", "'gone.jsonl' does not exist or is not a file"),
        ("p\0.jsonl", "NUL"),
        (None, "of type NoneType"),
        ({"w5"}, "of type set"),
        (b"w5", "of type bytes"),
        (5, "of type int"),
        (io.StringIO("w5\nw6\n"), "of type StringIO"),
        (iter([]), "an iterator yields its rows only once"),
        ({"prompt": ["w5"]}, "a dict with the keys prompt, not a list of rows"),
        (["w5", ""], r"prompts\[1\] is an empty string"),
        ([[]], r"prompts\[0\] is empty"),
        ([[1.5]], r"prompts\[0\] holds torch.float32 values"),
        ([[True]], r"prompts\[0\] holds torch.bool values"),
        ([[5, 61]], r"prompts\[0\] contains token id 61; the tokenizer has ids 0 to 60"),
        (
            [{"prompt": "w5", "prompt_ids": [7]}],
            "has a column 'prompt_ids', a name reserved for an argument of reward functions",
        ),
        ([[5, -1]], r"prompts\[0\] contains token id -1"),
        ([[[5]]], r"prompts\[0\] is of type list and shape \[1, 1\]"),
        ([["w5", "w6"]], r"prompts\[0\] is \['w5', 'w6'\]: expected a text, token ids or chat messages"),
        ([{"prompt": "w5", 3: 1}], "a column named 3"),
        ([{"prompt": "w5", "completions": 1}], "column 'completions', a name reserved"),
        (user("w5"), "wrap its list of messages in another list"),
        ([{"prompt": "w5", "id": "a"}, {"prompt": "w5", "id": None}], r"prompts\[1\] has id=None"),
        ([{"prompt": "w5", "id": 1.0}], "id=1.0"),
        (
            [{"prompt": "w5", "id": "a"}, {"prompt": "w6", "id": "a"}],
            r"prompts\[1\].* repeats the id 'a' of prompts\[0\]",
        ),
        ([{"prompt": "w5", "id": 1}, "w6"], r"prompts\[1\] repeats the id '1' of prompts\[0\]"),
    ],
)
def test_bad_sources(source: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load(source)


def test_text_of_which_no_token_is_left() -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens: '  '"):
        load(["w5", "  "])


def test_too_long_prompts_are_counted_and_named() -> None:
    source = ["w5", "w5 w6 w7", [5, 6, 7, 8]]
    assert len(load(source, max_tokens=4)) == 3
    reason = (
        r"2 of 3 prompts have more than max_tokens=2 tokens: prompts\[1\] has 3, prompts\[2\] has 4; the longest has 4"
    )
    with pytest.raises(ValueError, match=reason):
        load(source, max_tokens=2)
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match=f"max_tokens={bad}"):
            load(source, max_tokens=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([{"role": "user"}], "message 0 is .*, not a mapping with role and content"),
        ([{"role": "user", "content": "w5"}, "w6"], "message 1 is 'w6', not a mapping"),
        ([*user("w5"), {"role": "assistant", "content": "w6"}], "ends with an assistant message"),
    ],
)
def test_bad_chats(chat: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_prompts([chat], tokenizer(chat=True))


def test_chat_without_a_template_or_one_that_refuses() -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\] is a chat, but the tokenizer has no chat template"):
        load([user("w5")])
    strict = tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"prompts\[1\] was rejected by the chat template: .*roles must alternate"):
        load_prompts(["w5", user("w5")], strict)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load(tmp_path / "p.parquet")


def test_fingerprint_sees_ids_tokens_and_order() -> None:
    def of(source: Any) -> str:
        return fingerprint(load(source))

    same = of(["w5", "w6"])
    assert same == of([[5], [6]]) and len(same) == 64
    others = [["w6", "w5"], ["w5", "w7"], ["w5"], [{"prompt": "w5", "id": "a"}, {"prompt": "w6", "id": "b"}]]
    assert same not in [of(source) for source in others]


def test_fingerprints_of_columns_see_every_change_and_nothing_else() -> None:
    class Thing:
        pass

    def prints(**columns: Any) -> dict[str, str]:
        return column_fingerprints([Prompt(id="0", text="a", tokens=torch.tensor([3]), columns=columns)])

    values: list[Any] = [
        None, True, 2, 2.5, "text", [1, 2], {"a": [1]}, {"a": [2]}, {1, 9}, b"bytes", Thing(), np.arange(3), np.arange(4),
        np.zeros(3), np.int64(2), np.float32(2), torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1, 3), np.array([None, 1]),
        datetime.date(2020, 1, 1), datetime.date(2020, 1, 2),
    ]  # fmt: skip
    digests = [prints(x=value)["x"] for value in values]
    assert len(set(digests)) == len(values)
    assert prints(x=copy.deepcopy(values), y=0)["x"] == prints(x=values)["x"]  # wherever in memory they are
    first, second = {1, 9}, {9, 1}
    assert list(first) != list(second) and prints(x=first) == prints(x=second)
    assert prints(x={"a": 1, "b": 2}) == prints(x={"b": 2, "a": 1})
    assert set(prints(x=1, y=2)) == {"x", "y"} and prints(x=1, y=2)["x"] == prints(x=1)["x"]
