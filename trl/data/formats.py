"""Formats of rows for offline training: what a row is, whether it is sound, and its texts.

A row is a mapping of columns. Its kind follows from the columns, and each kind comes as text (standard) or as chat
messages (conversational):

| kind | columns |
| --- | --- |
| language_modeling | `text`, or `messages` |
| prompt_only | `prompt` |
| prompt_completion | `prompt`, `completion` |
| preference | `prompt`, `chosen`, `rejected`; the prompt may instead begin both `chosen` and `rejected` |
| unpaired_preference | `prompt`, `completion`, `label` (True: a good completion) |
| stepwise_supervision | `prompt`, `completions` (a list of steps), `labels` (a list: is the step right?); as text only |

`prepare` reads, checks and renders a data set; TRL 1's helpers on single rows (`trl.data.row_helpers`) are here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.data.readers import SUFFIXES, Located, read_rows
from trl.data.row_helpers import (
    CONTENT_COLUMNS,
    Kind,
    Row,
    apply_chat_template,
    extract_prompt,
    is_conversational,
    maybe_apply_chat_template,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    render_columns,
    unpair_preference_dataset,
)

__all__ = [
    "DataFormat",
    "Kind",
    "Prepared",
    "Row",
    "apply_chat_template",
    "check_messages",
    "check_rows",
    "content_columns",
    "convert",
    "detect_format",
    "extract_prompt",
    "is_conversational",
    "maybe_apply_chat_template",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "open_source",
    "prepare",
    "read",
    "render",
    "tools_of",
    "unpair_preference_dataset",
]


# The other kinds that a row of each kind can be turned into.
_CONVERSIONS: dict[Kind, tuple[Kind, ...]] = {
    "language_modeling": (),
    "prompt_only": (),
    "prompt_completion": ("language_modeling", "prompt_only"),
    "preference": ("language_modeling", "prompt_only", "prompt_completion", "unpaired_preference"),
    "unpaired_preference": ("language_modeling", "prompt_only", "prompt_completion"),
    "stepwise_supervision": ("prompt_only",),
}
_REMEDY = "correct the row or leave it out, for example with dataset.filter"
MAX_STREAMED = 1_000_000  # rows of a stream that are held in memory


@dataclass(frozen=True, slots=True)
class DataFormat:
    """What a row holds, and whether as text or as chat messages."""

    kind: Kind
    conversational: bool

    def __str__(self) -> str:
        return f"{self.kind} ({'chat messages' if self.conversational else 'text'})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Checked rows whose content columns are texts."""

    kind: Kind
    rendered: bool  # by a chat template, which has added special tokens: tokenise without adding more
    rows: list[dict[str, Any]]  # content columns as texts, then the other columns as they were
    locations: list[str]  # of each row, for error messages: "train.jsonl:8 (row 7)"


def detect_format(row: Row, *, text_field: str = "text", location: str = "the row") -> DataFormat:
    """Returns the format of a row, from its columns and the type of their values.

    Args:
        row: columns by name.
        text_field: the column that holds the text of a language-modelling row.
        location: names the row in errors.

    Raises:
        ValueError: if the columns are those of no kind.
    """
    if {"chosen", "rejected"} <= row.keys():
        columns: tuple[str, ...] = ("prompt", "chosen", "rejected")
        kind: Kind = "preference"
    elif {"prompt", "completions"} <= row.keys():
        columns, kind = ("prompt",), "stepwise_supervision"
    elif {"prompt", "completion"} <= row.keys():
        columns, kind = ("prompt", "completion"), "unpaired_preference" if "label" in row else "prompt_completion"
    elif "messages" in row:
        columns, kind = ("messages",), "language_modeling"
    elif text_field in row:
        return DataFormat("language_modeling", isinstance(row[text_field], list))
    elif "prompt" in row:
        columns, kind = ("prompt",), "prompt_only"
    else:
        raise ValueError(
            f"{location} has the columns {', '.join(map(str, row)) or '(none)'}, which are no known format: expected "
            f"{text_field} or messages; prompt; prompt and completion; prompt, chosen and rejected; prompt, completion "
            "and label; or prompt, completions and labels. Rename the columns, for example with dataset.rename_column, "
            "or name the column of texts"
        )
    return DataFormat(kind, is_conversational({name: row[name] for name in columns if name in row}))


def read(
    source: Any, *, name: str = "train_dataset", text_field: str = "text", max_streamed: int = MAX_STREAMED
) -> Iterator[tuple[str, dict[str, Any], DataFormat]]:
    """Yields the checked rows of a data set in order, each with its location and format, which is the same for all.

    Args:
        source: a path to a JSONL, CSV or Parquet file; a hub id or another folder that `datasets.load_dataset` reads,
            of which the split "train" is taken; a `datasets.Dataset`; a sequence of rows; or a finite stream of rows.
        name: the caller's argument that holds `source`, for error messages.
        text_field: the column that holds the text of a language-modelling row.
        max_streamed: maximum number of rows in a stream.

    Raises:
        ValueError: if a row is not sound: the message has its location, the column, the value and the remedy.
        ImportError: if the source needs datasets or pyarrow, and that is missing.
    """
    yield from check_rows(open_source(source, name, max_streamed), text_field=text_field)


def check_rows(
    rows: Iterable[Located], *, text_field: str = "text", expected: DataFormat | None = None
) -> Iterator[tuple[str, dict[str, Any], DataFormat]]:
    """Yields each row with its format; like `read`, for rows that are read already.

    Args:
        rows: locations and rows.
        text_field: the column that holds the text of a language-modelling row.
        expected: the format of all rows; None takes the first row's.

    Raises:
        ValueError: as `read`.
    """
    first = ""
    for location, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{location} is {_shown(row)}: expected a mapping of columns, such as {{'{text_field}': ...}}"
            )
        columns = _as_messages(location, row)
        if expected is None:
            expected, first = detect_format(columns, text_field=text_field, location=location), location
        _check_columns(location, columns, expected, text_field, first)
        yield location, columns, expected


def prepare(
    source: Any,
    kind: Kind,
    tokenizer: Any,
    *,
    name: str = "train_dataset",
    text_field: str = "text",
    split_prompts: bool = True,
    max_streamed: int = MAX_STREAMED,
) -> Prepared:
    """Reads a data set, checks every row, renders chats by the tokenizer's template and converts rows to one kind.

    Args:
        source: as for `read`.
        kind: the kind of the returned rows. "language_modeling" has the column `text`; the others as in this module's
            table.
        tokenizer: the model's tokenizer, whose chat template renders conversational rows.
        name: the caller's argument that holds `source`, for error messages.
        text_field: the column that holds the text of a language-modelling row.
        split_prompts: takes the common beginning of `chosen` and `rejected` as the prompt where a preference row has
            none; False leaves such rows without a prompt.
        max_streamed: maximum number of rows in a stream.

    Raises:
        ValueError: if there are no rows, a row is not sound, or rows cannot be converted to `kind`.
        ImportError: as `read`.
    """
    prepared = Prepared(kind=kind, rendered=False, rows=[], locations=[])
    rendered = False
    for location, row, row_format in read(source, name=name, text_field=text_field, max_streamed=max_streamed):
        rendered = row_format.conversational
        split = split_prompts or kind != "preference"
        texts = render(row, row_format, tokenizer, location=location, text_field=text_field, split_prompts=split)
        for converted in convert(texts, row_format.kind, kind, location=location):
            prepared.rows.append(converted)
            prepared.locations.append(location)
    if not prepared.rows:
        raise ValueError(f"{name} has no rows to train on as {kind}: {_shown(source)}")
    return Prepared(kind=kind, rendered=rendered, rows=prepared.rows, locations=prepared.locations)


def render(
    row: Row,
    row_format: DataFormat,
    tokenizer: Any,
    *,
    location: str = "the row",
    text_field: str = "text",
    split_prompts: bool = True,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Returns a checked row with texts in its content columns, and `text` for `messages` and for the text field.

    Args:
        row: a row from `read`.
        row_format: its format.
        tokenizer: renders chat messages.
        location: names the row in errors.
        text_field: the column that holds the text of a language-modelling row.
        split_prompts: as for `prepare`.
        chat_template: replaces the tokenizer's own template.

    Raises:
        ValueError: if the template rejects the row, or if the rendered prompt is not the beginning of the rendered
            prompt and completion.
    """
    columns: dict[str, Any] = dict(row)
    if row_format.kind == "preference" and split_prompts:
        columns = columns | maybe_extract_prompt(columns)
        if not columns["prompt"]:
            raise ValueError(
                f"{location} has no prompt: chosen and rejected begin differently, with {_shown(columns['chosen'])} "
                f"and {_shown(columns['rejected'])}. Give the prompt in a column of its own, or {_REMEDY}"
            )
    plain = row_format.kind == "language_modeling" and "messages" not in columns
    if not row_format.conversational:
        return columns | {"text": columns.pop(text_field)} if plain else columns
    if plain:
        columns["messages"] = columns.pop(text_field)
    if not (chat_template or getattr(tokenizer, "chat_template", None)):
        raise ValueError(
            f"{location} holds chat messages, but the tokenizer has no chat template: set tokenizer.chat_template, "
            "call trl.setup_chat_format(model, tokenizer), or pass texts"
        )
    options = {} if chat_template is None else {"chat_template": chat_template}
    names = (*content_columns(row_format, columns, text_field), "label", "chat_template_kwargs")
    given = {name: columns.pop(name) for name in names if name in columns}
    try:
        texts, ending = render_columns(given, tokenizer, tools_of(columns), options)
    except ImportError:
        raise
    except Exception as error:  # templates may raise anything; add which row it was
        raise ValueError(f"{location} was rejected by the chat template: {error}. Please {_REMEDY}") from error
    if ending:
        raise ValueError(
            f"{location}: the rendered prompt is not a prefix of the rendered prompt and completion, which lack its "
            f"end {_shown(ending)}, so a model would never be trained on the prompt that it is given later. Use a chat "
            "template that renders a prompt the same way in both, or give the whole chat in a column messages"
        )
    return columns | texts


def convert(row: Row, kind: Kind, to: Kind, *, location: str = "the row") -> list[dict[str, Any]]:
    """Converts a row of texts of one kind into rows of another; the other columns are copied.

    A preference row becomes two unpaired rows, or one of the chosen completion; an unpaired row with a bad completion
    becomes no row to imitate.

    Args:
        row: a row of texts, as `render` returns it.
        kind: its kind.
        to: the kind of the returned rows.
        location: names the row in errors.

    Raises:
        ValueError: if rows of one kind hold less than the other needs.
    """
    if kind == to:
        return [dict(row)]
    if to not in _CONVERSIONS[kind]:
        sources = [name for name, targets in _CONVERSIONS.items() if to in (name, *targets)]
        raise ValueError(
            f"{location} is {kind}, which cannot be used as {to}: that needs data of kind {' or '.join(sources)}"
        )
    rest = {
        name: value for name, value in row.items() if name not in (*CONTENT_COLUMNS, "label", "completions", "labels")
    }
    prompt = row["prompt"]
    if to == "prompt_only":
        return [{"prompt": prompt} | rest]
    if kind == "preference":
        good, bad = row["chosen"], [row["rejected"]]
    else:
        good, bad = row["completion"], []
        if kind == "unpaired_preference" and not row["label"]:
            return []
    if to == "language_modeling":
        return [{"text": prompt + good} | rest]
    if to == "prompt_completion":
        return [{"prompt": prompt, "completion": good} | rest]
    labelled = [(good, True), *((text, False) for text in bad)]
    return [{"prompt": prompt, "completion": text, "label": label} | rest for text, label in labelled]


def open_source(source: Any, name: str, max_streamed: int = MAX_STREAMED) -> Iterator[Located]:
    """Yields the rows of a source with their locations; a string that names no file is a hub id or a folder."""
    is_text = isinstance(source, str | Path) and "\0" not in str(source)
    if is_text and Path(source).suffix.lower() not in SUFFIXES and not Path(source).is_file():
        try:
            import datasets
        except ImportError as error:
            raise ImportError(
                f"{name}={str(source)!r} is no {', '.join(SUFFIXES)} file; a hub id or a folder needs datasets: pip "
                "install datasets"
            ) from error
        try:
            source = datasets.load_dataset(str(source), split="train")
        except (FileNotFoundError, ConnectionError, ValueError) as error:
            raise ValueError(
                f"{name}={str(source)!r} is neither a file nor a data set with a split train: {error}. Load it "
                "yourself, and pass the split: datasets.load_dataset(..., split=...)"
            ) from error
    return read_rows(source, max_streamed=max_streamed, name=name)


def tools_of(row: Row) -> Any:
    """Returns the tools of a row's chat, which a data set may hold as JSON; None if it has none."""
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def content_columns(row_format: DataFormat, row: Row, text_field: str = "text") -> tuple[str, ...]:
    """Returns the columns of a row that hold texts or messages."""
    if row_format.kind == "language_modeling":
        return ("messages",) if "messages" in row else (text_field,)
    if row_format.kind in ("prompt_only", "stepwise_supervision"):
        return ("prompt",)
    wanted = ("prompt", "chosen", "rejected") if row_format.kind == "preference" else ("prompt", "completion")
    return tuple(name for name in wanted if name != "prompt" or row_format.kind != "preference" or "prompt" in row)


def _check_columns(location: str, row: Row, expected: DataFormat, text_field: str, first: str) -> None:
    columns = content_columns(expected, row, text_field)
    labelled = {"unpaired_preference": ("label",), "stepwise_supervision": ("completions", "labels")}
    needed = (*columns, *labelled.get(expected.kind, ()))
    if missing := [name for name in needed if name not in row]:
        reason = f", as {first} does" if first and first != location else ""
        raise ValueError(
            f"{location} has no column {' and no column '.join(missing)}, but the columns "
            f"{', '.join(map(str, row)) or '(none)'}: every row must be {expected}{reason}. Please {_REMEDY}"
        )
    if expected.kind == "stepwise_supervision":
        _check_steps(location, row)
    for column in columns:
        value = row[column]
        if expected.conversational and (
            column != "prompt" or not isinstance(value, str) or expected.kind != "preference"
        ):
            check_messages(location, column, value)
        elif not isinstance(value, str):
            raise ValueError(
                f"{location}, column {column!r}, is {_shown(value)} ({type(value).__name__}): expected a text. Please "
                f"{_REMEDY}"
            )
        elif not value.strip() and column != "prompt":
            raise ValueError(
                f"{location}, column {column!r}, is empty ({value!r}): there is nothing to learn. Please {_REMEDY}"
            )
    if expected.kind == "unpaired_preference" and (not isinstance(row["label"], int) or row["label"] not in (0, 1)):
        raise ValueError(
            f"{location}, column 'label', is {_shown(row['label'])} ({type(row['label']).__name__}): expected True for "
            f"a good completion or False for a bad one. Please {_REMEDY}"
        )


def _check_steps(location: str, row: Row) -> None:
    steps, labels = row["completions"], row["labels"]
    if not isinstance(row["prompt"], str):
        raise ValueError(
            f"{location}, column 'prompt', is {_shown(row['prompt'])} ({type(row['prompt']).__name__}): rows with "
            "labelled steps are texts. Render a chat with tokenizer.apply_chat_template(messages, tokenize=False, "
            "add_generation_prompt=True)"
        )
    for column, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(
                f"{location}, column {column!r}, is {_shown(value)} ({type(value).__name__}): expected a list with an "
                f"element for each step. Please {_REMEDY}"
            )
    if len(steps) != len(labels) or not steps:
        raise ValueError(
            f"{location} has {len(steps)} completions and {len(labels)} labels: expected one label per step, and at "
            f"least one step. Please {_REMEDY}"
        )
    for number, (step, label) in enumerate(zip(steps, labels, strict=True)):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(
                f"{location}, column 'completions', step {number}, is {_shown(step)} ({type(step).__name__}): expected "
                f"a text that is not empty. Please {_REMEDY}"
            )
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(
                f"{location}, column 'labels', step {number}, is {_shown(label)} ({type(label).__name__}): expected "
                f"True for a right step, False for a wrong one, or a number from 0 to 1. Please {_REMEDY}"
            )


def check_messages(location: str, column: str, messages: Any) -> None:
    """Raises a ValueError that names row, column and message if `messages` is not a chat of texts."""
    where = f"{location}, column {column!r},"
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(
            f"{where} is {_shown(messages)} ({type(messages).__name__}): expected a list of messages. Please {_REMEDY}"
        )
    if not messages:
        raise ValueError(f"{where} is empty: expected at least one message. Please {_REMEDY}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where} message {number} is {_shown(message)}: expected role and content. Please {_REMEDY}"
            )
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if isinstance(content, list):
            kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
            if other := sorted({str(kind) for kind in kinds} - {"text"}):
                raise ValueError(
                    f"{where} message {number} holds content of type {', '.join(other)}: only text is supported. "
                    f"Please {_REMEDY}"
                )
        elif not isinstance(content, str):
            raise ValueError(
                f"{where} message {number} has the content {_shown(content)} ({type(content).__name__}): expected a "
                f"text. Please {_REMEDY}"
            )
        if not content and message["role"] == "assistant":
            raise ValueError(
                f"{where} message {number} of the assistant is empty: there is nothing to learn. Please {_REMEDY}"
            )


def _as_messages(location: str, row: Row) -> dict[str, Any]:
    """Returns the row's columns, with ShareGPT's `conversations` of `from` and `value` as `messages`."""
    columns = dict(row)
    if "conversations" not in columns or any(name in columns for name in CONTENT_COLUMNS):
        return columns
    roles = {"human": "user", "gpt": "assistant"}
    messages = columns.pop("conversations")
    if isinstance(messages, Sequence) and messages and all(isinstance(m, Mapping) and "from" in m for m in messages):
        messages = [{"role": roles.get(m["from"], m["from"]), "content": m.get("value")} for m in messages]
    check_messages(location, "conversations", messages)
    return columns | {"messages": messages}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
