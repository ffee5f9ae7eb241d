"""Turns checked rows into tokens, and marks those that a supervised loss counts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from trl.data.formats import DataFormat, Row, check_rows, render, tools_of
from trl.data.readers import Located
from trl.data.tokenized import IGNORED, Tokens

logger = logging.getLogger(__name__)

_ROWS_PER_CALL = 1000  # rows tokenised per call of the tokenizer
_TOKENISED_COLUMNS = ("labels", "completion_mask", "assistant_masks", "attention_mask")


@dataclass(kw_only=True)
class RowEncoder:
    """Encodes rows of text, chats, prompts with completions, or token ids; `__call__` keeps their order.

    Attributes:
        tokenizer: the model's tokenizer.
        text_field: column of a language-modelling row.
        completion_only: count the completion's tokens alone. None: for rows with a prompt and a completion.
        assistant_only: count the assistant's messages alone; for chats.
        separate_prompts: leave the prompt to an encoder.
        chat_template: replaces the tokenizer's own.
        max_length: longer rows are truncated; None for no limit.
        keep: which end of a row truncation keeps.
        formatting: turns a row into its text; with `formatting_batches` a mapping of columns into a list of texts.
        expected: the rows' format; None takes the first row's.
    """

    tokenizer: Any
    text_field: str = "text"
    completion_only: bool | None = None
    assistant_only: bool = False
    separate_prompts: bool = False
    chat_template: str | None = None
    max_length: int | None = None
    keep: Literal["start", "end"] = "start"
    formatting: Callable[[Any], Any] | None = None
    formatting_batches: bool = False
    expected: DataFormat | None = None
    dropped: int = 0  # rows without a counted token, so far
    _warned: bool = False

    def __call__(self, rows: Iterable[Located]) -> Iterator[Tokens]:
        """Yields the tokens of each row that has a counted token.

        Raises:
            ValueError: if a row is not sound; the message has its location, the value and the remedy.
        """
        remaining = iter(rows)
        while chunk := list(islice(remaining, _ROWS_PER_CALL)):
            for tokens in self._encode(chunk):
                tokens = self._truncated(tokens)
                first = 0 if self.separate_prompts else 1  # nothing predicts a decoder's first token
                if any(tokens.counted[first:]):
                    yield tokens
                else:
                    self.dropped += 1

    def _encode(self, chunk: list[Located]) -> Iterator[Tokens]:
        if self.formatting is not None:
            chunk = list(_formatted(chunk, self.formatting, self.formatting_batches, self.text_field))
        if isinstance(chunk[0][1], Mapping) and "input_ids" in chunk[0][1]:
            yield from (self._from_tokens(location, row) for location, row in chunk)
            return
        checked = list(check_rows(chunk, text_field=self.text_field, expected=self.expected))
        row_format = self.expected = checked[0][2]
        self._check_settings(checked[0][0], row_format)
        if self.assistant_only:
            yield from (self._from_chat(location, row, row_format) for location, row, _ in checked)
            return
        texts = [
            render(
                row,
                row_format,
                self.tokenizer,
                location=location,
                text_field=self.text_field,
                chat_template=self.chat_template,
            )
            for location, row, _ in checked
        ]
        locations = [location for location, _, _ in checked]
        yield from self._from_texts(locations, texts, row_format)

    def _check_settings(self, location: str, row_format: DataFormat) -> None:
        if row_format.kind not in ("language_modeling", "prompt_completion"):
            raise ValueError(
                f"{location} is {row_format}: supervised fine-tuning takes texts, chats, or prompts with completions. "
                "Convert the rows with trl.data.formats.prepare or remove the other columns, for example label"
            )
        paired = row_format.kind == "prompt_completion"
        if self.completion_only and not paired:
            raise ValueError(
                f"completion_only_loss=True, but {location} is {row_format}: give prompt and completion in columns of "
                "their own, or leave completion_only_loss out"
            )
        if self.assistant_only and not row_format.conversational:
            raise ValueError(f"assistant_only_loss=True, but {location} is {row_format}: it needs chat messages")
        if self.separate_prompts and not paired:
            raise ValueError(
                f"an encoder-decoder reads a prompt and writes a completion, but {location} is {row_format}"
            )

    def _from_texts(self, locations: Sequence[str], rows: Sequence[Row], row_format: DataFormat) -> Iterator[Tokens]:
        rendered = row_format.conversational
        if row_format.kind == "language_modeling":
            for location, ids in zip(locations, self._ids([row["text"] for row in rows], rendered), strict=True):
                ids = self._ended(ids, rendered)
                yield Tokens(ids=ids, counted=[True] * len(ids), location=location)
            return
        prompts = self._ids([row["prompt"] for row in rows], rendered)
        if self.separate_prompts:
            completions = self._ids([row["completion"] for row in rows], rendered)
            for location, prompt, ids in zip(locations, prompts, completions, strict=True):
                ids = self._ended(ids, rendered)
                yield Tokens(ids=ids, counted=[True] * len(ids), prompt=prompt, location=location)
            return
        both = self._ids([row["prompt"] + row["completion"] for row in rows], rendered)
        for location, prompt, ids in zip(locations, prompts, both, strict=True):
            shared = _shared_length(prompt, ids)
            self._warn_about_merges(location, prompt, shared)
            ids = self._ended(ids, rendered)
            first = shared if self.completion_only is not False else 0
            yield Tokens(ids=ids, counted=[index >= first for index in range(len(ids))], location=location)

    def _ids(self, texts: list[str], rendered: bool) -> list[list[int]]:
        if not any(texts):
            return [[] for _ in texts]
        # verbose=False: rows that are too long are truncated below.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not rendered, verbose=False)["input_ids"]
        return ids

    def _ended(self, ids: list[int], rendered: bool) -> list[int]:
        """Ends a text with the end-of-sequence token; a chat's template has ended it."""
        end = self.tokenizer.eos_token_id
        return ids if rendered or end is None or (ids and ids[-1] == end) else [*ids, end]

    def _warn_about_merges(self, location: str, prompt: list[int], shared: int) -> None:
        special = set(self.tokenizer.all_special_ids)
        if self._warned or all(token in special for token in prompt[shared:]):
            return
        self._warned = True
        logger.warning(
            "%s: the end of the prompt, %r, is another token in front of the completion, so the completion's loss "
            "begins there; begin completions with a space, or end prompts with a line break, to keep them apart. Not "
            "repeated for other rows",
            location,
            self.tokenizer.decode(prompt[shared:]),
        )

    def _from_chat(self, location: str, row: Row, row_format: DataFormat) -> Tokens:
        """Encodes a chat and counts the assistant's messages, by the template's marks or by rendering prefixes."""
        paired = row_format.kind == "prompt_completion"
        messages = [*row["prompt"], *row["completion"]] if paired else row.get("messages", row.get(self.text_field))
        assert messages is not None
        template = self.chat_template or self.tokenizer.chat_template
        options = {**(row.get("chat_template_kwargs") or {}), "tools": tools_of(row), "chat_template": template}
        first = len(row["prompt"]) if paired and self.completion_only is not False else 0
        if template and re.search(r"\{%-?\s*generation\s*-?%\}", template) and not first:
            marked = self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            ids, counted = list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
        else:
            ids, counted = self._spans(location, messages, first, options)
        if not any(counted):
            raise ValueError(
                f"{location} has no message of the assistant to learn from (assistant_only_loss=True): leave the row "
                "out, or mark the assistant's part of the chat template with {% generation %}"
            )
        return Tokens(ids=ids, counted=counted, location=location)

    def _spans(
        self, location: str, messages: Sequence[Row], first: int, options: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot say where its tokens stand in a text, which "
                "assistant_only_loss=True needs: use a fast tokenizer, or a chat template with {% generation %} marks"
            )

        def text_of(count: int, **more: Any) -> str:
            return str(self.tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, **more, **options))

        whole = text_of(len(messages))
        spans = []
        for number in range(max(first, 1), len(messages)):
            if messages[number]["role"] != "assistant":
                continue
            before, after = text_of(number, add_generation_prompt=True), text_of(number + 1)
            if not (whole.startswith(before) and whole.startswith(after) and len(after) > len(before)):
                raise ValueError(
                    f"{location}: the chat template renders message {number} differently inside the whole chat, so its "
                    "tokens cannot be told from the others. Use a chat template with {% generation %} marks, or give "
                    "the last answer as completion and what precedes it as prompt"
                )
            spans.append((len(before), len(after.rstrip())))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counted = [
            any(start >= begin and stop <= end for begin, end in spans) and stop > start
            for start, stop in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), counted

    def _from_tokens(self, location: str, row: Any) -> Tokens:
        """Takes over a row of token ids, with what its other columns say about the loss."""
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise ValueError(f"{location} has no column input_ids, which the rows before it have")
        ids = row["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"{location}, column 'input_ids', is {str(ids)[:80]}: expected a list of token ids")
        columns = {name: row[name] for name in _TOKENISED_COLUMNS if row.get(name) is not None}
        for name, values in columns.items():
            if len(values) != len(ids):
                raise ValueError(f"{location} has {len(ids)} input_ids, but {len(values)} {name}: expected as many")
        counted = [True] * len(ids)
        if "labels" in columns:
            if wrong := [(a, b) for a, b in zip(ids, columns["labels"], strict=True) if b not in (a, IGNORED)]:
                raise ValueError(
                    f"{location} has the label {wrong[0][1]} at a token {wrong[0][0]}: a label is the token itself, or "
                    f"{IGNORED} where the loss does not count it"
                )
            counted = [int(label) != IGNORED for label in columns["labels"]]
        else:
            if "completion_mask" in columns and self.completion_only is not False:
                counted = [bool(flag) for flag in columns["completion_mask"]]
            elif self.completion_only:
                raise ValueError(f"completion_only_loss=True, but {location} has neither labels nor completion_mask")
            if "assistant_masks" in columns:
                counted = [both and bool(flag) for both, flag in zip(counted, columns["assistant_masks"], strict=True)]
            elif self.assistant_only:
                raise ValueError(f"assistant_only_loss=True, but {location} has neither labels nor assistant_masks")
        if "attention_mask" in columns:
            shown = [bool(flag) for flag in columns["attention_mask"]]
            ids = [token for token, flag in zip(ids, shown, strict=True) if flag]
            counted = [count for count, flag in zip(counted, shown, strict=True) if flag]
        return Tokens(ids=ids, counted=counted, location=location)

    def _truncated(self, tokens: Tokens) -> Tokens:
        longest = max(len(tokens.ids), len(tokens.prompt or ()))
        if self.max_length is None or longest <= self.max_length:
            return tokens
        end = self.keep == "end"
        span = slice(-self.max_length, None) if end else slice(None, self.max_length)
        prompt = None if tokens.prompt is None else tokens.prompt[span]
        return Tokens(ids=tokens.ids[span], counted=tokens.counted[span], prompt=prompt, location=tokens.location)


def _formatted(
    chunk: list[Located], formatting: Callable[[Any], Any], batches: bool, text_field: str
) -> Iterator[Located]:
    """Yields a text for each row, under the text field."""
    if not batches:
        for location, row in chunk:
            text = formatting(row)
            if not isinstance(text, str):
                raise ValueError(
                    f"{location}: formatting_func returned {repr(text)[:80]} ({type(text).__name__}): expected the "
                    "row's text"
                )
            yield location, {text_field: text}
        return
    names = list(chunk[0][1])
    texts = formatting({name: [row[name] for _, row in chunk] for name in names})
    if not isinstance(texts, list):
        raise ValueError(
            f"formatting_func returned {repr(texts)[:80]} ({type(texts).__name__}) for {len(chunk)} rows: without "
            "packing it gets a mapping of columns, and must return a list with a text for each row"
        )
    locations = [location for location, _ in chunk]
    if len(texts) != len(chunk):
        locations = [f"{locations[0]} to {locations[-1]}, text {number}" for number in range(len(texts))]
    yield from ((location, {text_field: text}) for location, text in zip(locations, texts, strict=True))


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
