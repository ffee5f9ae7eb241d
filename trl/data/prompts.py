"""Loads prompts for the training loop: text, tokens, a stable id, and columns for the reward."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.data.readers import read_rows

_PROMPT_COLUMNS = ("prompt", "query", "messages")
_ID_COLUMNS = ("prompt_id", "id")
# Reserved column names: reward functions receive these arguments from the loop.
_RESERVED_COLUMNS = ("prompts", "completions", "prompt_ids", "completion_ids")
_TEXTS_PER_CALL = 1024  # texts tokenised per call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A prompt as text and as tokens, with an id and extra columns."""

    id: str  # the row's `prompt_id` or `id`, else its index from 0; stable across runs
    text: str  # the text of `tokens`; for chat messages, the rendered template
    tokens: Tensor  # [Q] int64
    columns: Mapping[str, Any]  # the row's other columns, for the reward


@dataclass(slots=True, kw_only=True)
class _Draft:
    location: str
    id: str
    text: str
    tokens: Tensor | None  # None until the text is tokenised
    templated: bool  # rendered by a chat template, which already includes special tokens
    columns: dict[str, Any]


def load_prompts(
    source: Any, tokenizer: Any, *, max_tokens: int | None = None, max_streamed: int = 1_000_000
) -> list[Prompt]:
    """Reads, renders and tokenises prompts. Prompts are never truncated; one that is too long is rejected.

    A row is one of: a text; 1-D token ids (list, array or tensor); a chat, i.e. a list of messages with `role` and
    `content`, which is rendered by the tokenizer's chat template with its generation prompt; a mapping that holds one
    of these under `prompt`, `query` or `messages` (the first one present); or a `Prompt`. The other columns of a
    mapping are passed to the reward, with None for rows that lack a column.

    Args:
        source: a list of rows; a `datasets.Dataset`; a path to a JSONL, CSV or Parquet file; or a finite stream of rows
            (a `datasets.IterableDataset`, a generator or any other iterable), which is read to its end.
        tokenizer: the model's transformers tokenizer. It adds special tokens to texts, but not to rendered chats, whose
            template already includes them.
        max_tokens: maximum prompt length in tokens; None for no limit.
        max_streamed: maximum number of rows in a stream; a longer one is rejected as possibly infinite.

    Raises:
        ValueError: if a row is not a prompt, is empty, is longer than `max_tokens` or repeats another row's id (the
            message names the row and, for files, the line); if there are no rows; or if a stream has more than
            `max_streamed` rows.
        ImportError: if the source is a Parquet file and pyarrow is missing.
    """
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise ValueError(f"max_tokens={max_tokens!r} must be a whole number of at least 1, or None")
    rows = read_rows(source, max_streamed=max_streamed)
    drafts = [_draft_prompt(location, index, row, tokenizer) for index, (location, row) in enumerate(rows)]
    if not drafts:
        exhausted_hint = "; an iterator yields its rows only once, and this one may already be exhausted"
        source_hint = (
            f" in {source!r}" if isinstance(source, str) else exhausted_hint if isinstance(source, Iterator) else ""
        )
        raise ValueError(f"there are no prompts{source_hint}")
    _check_ids(drafts)
    _tokenise(drafts, tokenizer)
    _check_lengths(drafts, max_tokens)
    column_names = dict.fromkeys(name for draft in drafts for name in draft.columns)
    prompts = []
    for draft in drafts:
        assert draft.tokens is not None
        columns = {name: draft.columns.get(name) for name in column_names}
        prompts.append(Prompt(id=draft.id, text=draft.text, tokens=draft.tokens, columns=columns))
    return prompts


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Digest of ids and tokens in order, used by a resumed run to detect different prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.tokens.tolist()]).encode())
    return digest.hexdigest()


def column_fingerprints(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Digest of each column's values, by column name, used by a resumed run to detect changed columns.

    Objects other than plain values, arrays and tensors enter by their `repr`, with memory addresses removed.
    """
    digests: dict[str, Any] = {}
    for prompt in prompts:
        for name, value in prompt.columns.items():
            digest = digests.setdefault(name, hashlib.sha256())
            digest.update(json.dumps([prompt.id, _stable_json(value)]).encode())
    return {str(name): digest.hexdigest() for name, digest in digests.items()}


def _stable_json(value: Any) -> Any:
    """JSON-serialisable form of a value that is the same in every process and distinguishes different values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return ["mapping", sorted(json.dumps([_stable_json(key), _stable_json(item)]) for key, item in value.items())]
    if isinstance(value, list | tuple):
        return [_stable_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return ["set", sorted(json.dumps(_stable_json(item)) for item in value)]
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return ["scalar", str(value.dtype), str(value)]
    return [type(value).__qualname__, re.sub(r"0x[0-9a-fA-F]+", "", repr(value))]


def _draft_prompt(location: str, index: int, row: Any, tokenizer: Any) -> _Draft:
    if isinstance(row, Prompt):
        return _Draft(
            location=location, id=row.id, text=row.text, tokens=row.tokens, templated=False, columns=dict(row.columns)
        )
    prompt_id, columns = str(index), {}
    if isinstance(row, Mapping):
        column = next((name for name in _PROMPT_COLUMNS if name in row), None)
        if column is None:
            hint = (
                "; to pass a single chat, wrap its list of messages in another list"
                if {"role", "content"} <= set(row)
                else ""
            )
            raise ValueError(
                f"{location} has the columns {', '.join(map(str, row)) or '(none)'}: one of them must be "
                f"{', '.join(_PROMPT_COLUMNS[:-1])} or {_PROMPT_COLUMNS[-1]}{hint}"
            )
        columns = {key: value for key, value in row.items() if key != column}
        _check_columns(location, columns)
        prompt_id = _row_id(location, columns, default=prompt_id)
        location, row = f"{location}, column {column!r},", row[column]
    text, tokens, templated = _read_content(location, row, tokenizer)
    return _Draft(location=location, id=prompt_id, text=text, tokens=tokens, templated=templated, columns=columns)


def _check_columns(location: str, columns: Mapping[Any, Any]) -> None:
    for name in columns:
        if not isinstance(name, str):
            raise ValueError(f"{location} has a column named {name!r}; column names must be strings")
        if name in _RESERVED_COLUMNS:
            raise ValueError(
                f"{location} has a column {name!r}, a name reserved for an argument of reward functions: rename or "
                "remove it"
            )


def _row_id(location: str, columns: Mapping[str, Any], default: str) -> str:
    column = next((name for name in _ID_COLUMNS if name in columns), None)
    if column is None:
        return default
    value = columns[column]
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{location} has {column}={value!r}; expected an integer or a non-empty string")
    return str(value)


def _read_content(location: str, content: Any, tokenizer: Any) -> tuple[str, Tensor | None, bool]:
    """Returns the text, the tokens if already known, and whether a chat template rendered the text."""
    if isinstance(content, str):
        if not content:
            raise ValueError(f"{location} is an empty string")
        return content, None, False
    if isinstance(content, Sequence) and not isinstance(content, bytes) and any(
        isinstance(item, Mapping) for item in content
    ):  # fmt: skip
        return _render_chat(location, content, tokenizer), None, True
    tokens = _token_ids(location, content, len(tokenizer))
    return tokenizer.decode(tokens), tokens, False


def _render_chat(location: str, messages: Sequence[Any], tokenizer: Any) -> str:
    """Renders a chat with the tokenizer's template, up to and including the generation prompt."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(
                f"{location} message {number} is {str(message)[:80]!r}, not a mapping with role and content"
            )
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{location} ends with an assistant message: there is nothing left to answer")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{location} is a chat, but the tokenizer has no chat template: pass texts or set tokenizer.chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except ImportError:
        raise
    except Exception as error:  # templates may raise anything; add which row it was
        raise ValueError(f"{location} was rejected by the chat template: {error}") from error
    if not text:
        raise ValueError(f"{location} is empty after the chat template was applied")
    return str(text)


def _token_ids(location: str, content: Any, vocabulary: int) -> Tensor:
    try:
        tokens = torch.as_tensor(content)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(content)[:80]
        raise ValueError(f"{location} is {shown}: expected a text, token ids or chat messages") from error
    if tokens.dim() != 1:
        raise ValueError(
            f"{location} is of type {type(content).__name__} and shape {list(tokens.shape)}: expected a text, a 1-D "
            "list of token ids or chat messages"
        )
    if not len(tokens):
        raise ValueError(f"{location} is empty")
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"{location} holds {tokens.dtype} values, not token ids")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{location} contains token id {low if low < 0 else high}; the tokenizer has ids 0 to {vocabulary - 1}"
        )
    return tokens.to("cpu", torch.int64)


def _tokenise(drafts: Sequence[_Draft], tokenizer: Any) -> None:
    for templated in (False, True):
        untokenised = [draft for draft in drafts if draft.tokens is None and draft.templated == templated]
        for start in range(0, len(untokenised), _TEXTS_PER_CALL):
            chunk = untokenised[start : start + _TEXTS_PER_CALL]
            # verbose=False: over-long prompts are rejected later, with their row.
            ids = tokenizer([d.text for d in chunk], add_special_tokens=not templated, verbose=False)["input_ids"]
            for draft, token_ids in zip(chunk, ids, strict=True):
                draft.tokens = torch.tensor(token_ids, dtype=torch.int64)


def _check_ids(drafts: Sequence[_Draft]) -> None:
    first_place: dict[str, str] = {}
    for draft in drafts:
        if draft.id in first_place:
            raise ValueError(
                f"{draft.location} repeats the id {draft.id!r} of {first_place[draft.id]}: ids must be unique"
            )
        first_place[draft.id] = draft.location.removesuffix(",")


def _check_lengths(drafts: Sequence[_Draft], max_tokens: int | None) -> None:
    lengths = [0 if draft.tokens is None else len(draft.tokens) for draft in drafts]
    for draft, length in zip(drafts, lengths, strict=True):
        if not length:
            raise ValueError(f"{draft.location} has no tokens: {draft.text[:80]!r}")
    if max_tokens is None:
        return
    too_long = [f"{d.location} has {n}" for d, n in zip(drafts, lengths, strict=True) if n > max_tokens]
    if too_long:
        ellipsis = "" if len(too_long) <= 3 else ", ..."
        raise ValueError(
            f"{len(too_long)} of {len(drafts)} prompts have more than max_tokens={max_tokens} tokens: "
            f"{', '.join(too_long[:3])}{ellipsis}; the longest has {max(lengths)}"
        )
