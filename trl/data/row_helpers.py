"""TRL 1's helpers on single rows: chats to texts, implicit prompts, preferences to labelled completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

Kind = Literal[
    "language_modeling", "prompt_only", "prompt_completion", "preference", "unpaired_preference", "stepwise_supervision"
]
Row = Mapping[str, Any]

CONTENT_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
KINDS_OF_COLUMNS: dict[frozenset[str], Kind] = {
    frozenset({"messages"}): "language_modeling",
    frozenset({"prompt"}): "prompt_only",
    frozenset({"prompt", "completion"}): "prompt_completion",
    frozenset({"prompt", "chosen", "rejected"}): "preference",
    frozenset({"chosen", "rejected"}): "preference",
    frozenset({"prompt", "completion", "label"}): "unpaired_preference",
}


def is_conversational(example: Row) -> bool:
    """Whether a row holds chat messages: a content column that is a list of mappings with a `role`."""
    for name in CONTENT_COLUMNS[::-1]:
        value = example.get(name)
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
            return True
    return False


def apply_chat_template(
    example: Row, processing_class: Any, tools: Sequence[Any] | None = None, **template_kwargs: Any
) -> dict[str, Any]:
    """Renders a conversational row by a tokenizer's chat template; `messages` becomes `text`.

    A prompt ends with the generation prompt, or is left open if its last message is the assistant's. The completion is
    what follows the part that the rendered prompt shares with the rendered prompt and completion.

    Args:
        example: a row with the columns of one kind, and optionally `chat_template_kwargs`.
        processing_class: the tokenizer.
        tools: functions or schemas that the template shows to the model.
        **template_kwargs: variables of the template.

    Returns:
        The content columns as texts, and `label`.

    Raises:
        KeyError: if the columns are those of no kind.
        ValueError: if a prompt ends with a message of the system.
    """
    return render_columns(example, processing_class, tools or None, template_kwargs)[0]


def maybe_apply_chat_template(
    example: Row, processing_class: Any, tools: Sequence[Any] | None = None, **template_kwargs: Any
) -> dict[str, Any]:
    """`apply_chat_template` if the row is conversational; any other row as it is."""
    if is_conversational(example):
        return apply_chat_template(example, processing_class, tools, **template_kwargs)
    return dict(example)


def render_columns(
    row: Row, tokenizer: Any, tools: Any, template_kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Returns the texts of a conversational row, and the end of its prompt that a completion does not continue."""
    names = {name for name in (*CONTENT_COLUMNS, "label") if name in row}
    if frozenset(names) not in KINDS_OF_COLUMNS:
        raise KeyError(f"the columns {', '.join(sorted(names)) or '(none)'} are those of no kind: see trl.data.formats")
    options = {**(row.get("chat_template_kwargs") or {}), **template_kwargs}

    def text_of(messages: Iterable[Any], **more: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **more, **options))

    label = {"label": row["label"]} if "label" in row else {}
    if "messages" in row:
        return {"text": text_of(row["messages"])}, ""
    answers = [name for name in ("chosen", "rejected", "completion") if name in row]
    if "prompt" not in row:
        return {name: text_of(row[name]) for name in answers}, ""
    messages = row["prompt"]
    last = messages[-1]["role"]
    if last == "assistant":
        prompt = text_of(messages, continue_final_message=True)
    elif last in ("user", "tool"):
        prompt = text_of(messages, add_generation_prompt=True)
    else:
        raise ValueError(f"the prompt ends with a message of the role {last!r}: expected user, tool or assistant")
    whole = {name: text_of(chain(messages, row[name])) for name in answers}
    shared = _shared_beginning(prompt, *whole.values())
    texts = {name: text[len(shared) :] for name, text in whole.items()}
    return {"prompt": shared, **texts, **label}, prompt[len(shared) :]


def extract_prompt(example: Row) -> dict[str, Any]:
    """Splits `chosen` and `rejected`, texts or chats, into their common beginning and the rest of each.

    At least one character or message of each is left. A space before the completions belongs to them.

    Args:
        example: a row with `chosen` and `rejected`.

    Returns:
        `prompt`, `chosen` and `rejected`.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    limit = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(max(0, limit)) if chosen[i] != rejected[i]), max(0, limit))
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def maybe_extract_prompt(example: Row) -> dict[str, Any]:
    """`extract_prompt` for a preference row whose prompt is implicit; any other row as it is.

    A text as `prompt` of a conversational row repeats what `chosen` and `rejected` begin with, so it is replaced.
    """
    if "chosen" not in example or "rejected" not in example:
        return dict(example)
    if "prompt" in example and isinstance(example["prompt"], str) == isinstance(example["chosen"], str):
        return dict(example)
    return extract_prompt(example)


def unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """Turns each preference row into one with `label` True and one with False, under `completion`.

    Args:
        dataset: a `datasets.Dataset`, `DatasetDict` or `IterableDataset`, or a list of rows, with `chosen`, `rejected`
            and optionally `prompt`; other columns are copied.
        num_proc: processes of `dataset.map`.
        desc: label of its progress bar.
    """
    if isinstance(dataset, list):
        return [row for paired in dataset for row in _unpaired(paired)]
    columns = dataset.column_names
    if isinstance(columns, Mapping):
        columns = next(iter(columns.values()))
    options = {name: value for name, value in (("num_proc", num_proc), ("desc", desc)) if value is not None}
    return dataset.map(_unpair_columns, batched=True, remove_columns=columns, **options)


def maybe_unpair_preference_dataset(dataset: Any, num_proc: int | None = None, desc: str | None = None) -> Any:
    """`unpair_preference_dataset` if the data set has `chosen` and `rejected`; any other as it is."""
    columns = (dataset[0] if dataset else ()) if isinstance(dataset, list) else dataset.column_names
    if isinstance(columns, Mapping) and not isinstance(dataset, list):
        columns = next(iter(columns.values()))
    return unpair_preference_dataset(dataset, num_proc, desc) if {"chosen", "rejected"} <= set(columns) else dataset


def _unpaired(row: Row) -> list[dict[str, Any]]:
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    return [rest | {"completion": row[name], "label": name == "chosen"} for name in ("chosen", "rejected")]


def _unpair_columns(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns of a batch: good completions first, then bad ones, as TRL 1 orders them."""
    count = len(batch["chosen"])
    rest = {name: [*values, *values] for name, values in batch.items() if name not in ("chosen", "rejected")}
    completions = [*batch["chosen"], *batch["rejected"]]
    return rest | {"completion": completions, "label": [True] * count + [False] * count}


def _shared_beginning(*texts: str) -> str:
    first, last = min(texts), max(texts)  # in alphabetical order, so that these two differ first
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
