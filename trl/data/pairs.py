"""Preference data as token ids: prompts and answers, cut to length, and batches of them.

Rows hold `numpy` arrays of token ids, so that a large data set takes four bytes a token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trl.data.collators import pad

logger = logging.getLogger(__name__)

Truncation = Literal["keep_start", "keep_end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """How prompts and answers are cut to length."""

    total: int | None = None  # maximum tokens of prompt and answer
    prompt: int | None = None  # maximum tokens of a prompt, cut before the total is
    answer: int | None = None  # maximum tokens of an answer, which loses its end; of an encoder-decoder only
    mode: Truncation = "keep_start"  # the end that is kept of a prompt, and of prompt and answer together

    def cut(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Cuts a prompt and its answer to their limits; the answer is empty if the prompt fills `total`."""
        if self.prompt is not None:
            prompt = prompt[: self.prompt] if self.mode == "keep_start" else prompt[max(0, len(prompt) - self.prompt) :]
        if self.answer is not None:
            answer = answer[: self.answer]
        excess = 0 if self.total is None else len(prompt) + len(answer) - self.total
        if excess <= 0:
            return prompt, answer
        if self.mode == "keep_start":
            return prompt, answer[: max(0, len(answer) - excess)]
        return prompt[excess:], answer[max(0, excess - len(prompt)) :]


def token_ids(
    tokenizer: Any, texts: Sequence[str], *, rendered: bool, end: bool, target: bool = False
) -> list[list[int]]:
    """Tokenises texts.

    Args:
        tokenizer: the model's tokenizer.
        texts: `N` texts.
        rendered: a chat template has written the special tokens: none are added.
        end: ends each text with the tokenizer's eos token, unless it is there already or the text is `rendered`.
        target: the texts are a decoder's, not an encoder's.

    Raises:
        ValueError: if texts are to end with an eos token that the tokenizer lacks.
    """
    if not texts:
        return []
    source = {"text_target": list(texts)} if target else {"text": list(texts)}
    rows: list[list[int]] = tokenizer(**source, add_special_tokens=not rendered, verbose=False)["input_ids"]
    if rendered or not end:
        return rows
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no eos token to end a text with: set tokenizer.eos_token")
    return [row if row and row[-1] == eos else [*row, eos] for row in rows]


def prompts_and_answers(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    rendered: bool,
    is_encoder_decoder: bool = False,
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Tokenises prompts, each with one or several answers that share its tokens.

    Prompt and answer are tokenised together, as a model reads them. Where a token spans their boundary, it counts as
    the beginning of the answers, and the prompt loses its last tokens: a warning shows the first such prompt.

    Args:
        tokenizer: the model's tokenizer.
        prompts: `N` prompts.
        answers: one or several sequences of `N` answers.
        rendered: as for `token_ids`.
        is_encoder_decoder: the encoder reads prompts and the decoder answers: each is tokenised alone.

    Returns:
        `N` prompts, and for each sequence of answers its `N` token id lists.
    """
    heads = token_ids(tokenizer, prompts, rendered=rendered, end=False)
    if is_encoder_decoder:
        return heads, [token_ids(tokenizer, texts, rendered=rendered, end=True, target=True) for texts in answers]
    wholes = [
        token_ids(tokenizer, [p + a for p, a in zip(prompts, texts, strict=True)], rendered=rendered, end=True)
        for texts in answers
    ]
    starts = [min(_shared_length(head, whole[row]) for whole in wholes) for row, head in enumerate(heads)]
    eos = tokenizer.eos_token_id
    lost = [row for row, head in enumerate(heads) if starts[row] < len(head) - (1 if head and head[-1] == eos else 0)]
    if lost:
        row = lost[0]
        logger.warning(
            "%d of %d prompts end inside a token of prompt and answer, so that training sees another prompt than "
            "sampling will; end prompts at a word, and begin answers with the space. The first: %r loses %r",
            len(lost),
            len(heads),
            prompts[row][-40:],
            tokenizer.decode(heads[row][starts[row] :]),
        )
    cut = [head[:start] for head, start in zip(heads, starts, strict=True)]
    return cut, [[whole[start:] for whole, start in zip(wholes_of, starts, strict=True)] for wholes_of in wholes]


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of tokens with which both begin."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def rows_within(
    columns: Mapping[str, Sequence[Any]], limits: LengthLimits, answers: Sequence[str], *, name: str
) -> list[dict[str, Any]]:
    """Cuts tokenised columns to length and returns them as rows, without those of which nothing is left of an answer.

    Args:
        columns: `prompt_ids` and the columns in `answers`, lists of token ids; other columns are copied.
        limits: maximum lengths. With several answers, the prompt keeps what the shortest cut of it leaves.
        answers: names of the columns that hold answers.
        name: the caller's argument that holds the data, for messages.

    Raises:
        ValueError: if no row is left.
    """
    rows: list[dict[str, Any]] = []
    others = [column for column in columns if column not in ("prompt_ids", *answers)]
    total = len(columns["prompt_ids"])
    for row in range(total):
        prompt = columns["prompt_ids"][row]
        cuts = [limits.cut(prompt, columns[answer][row]) for answer in answers]
        if any(len(answer) == 0 for _, answer in cuts):
            continue
        shortest = min((kept for kept, _ in cuts), key=len)
        values = {"prompt_ids": shortest, **{n: answer for n, (_, answer) in zip(answers, cuts, strict=True)}}
        rows.append(
            {n: np.asarray(ids, dtype=np.int32) for n, ids in values.items()} | {n: columns[n][row] for n in others}
        )
    dropped(total, len(rows), limits.total, name)
    return rows


def dropped(total: int, left: int, limit: int | None, name: str) -> None:
    """Logs how many rows were too long.

    Raises:
        ValueError: if no row is left.
    """
    if not left:
        raise ValueError(
            f"each of the {total} rows of {name} is too long for max_length={limit}: set a larger max_length, or "
            "shorten the texts"
        )
    if left < total:
        logger.warning("%s: %d of %d rows are left out as too long for max_length=%s", name, total - left, total, limit)


class PairCollator:
    """Pads pairs of whole texts to one batch: the chosen texts first, then the rejected ones.

    Args:
        pad_token_id: fills padding.
        pad_to_multiple_of: makes the number of columns a multiple of this.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates `B` rows with `chosen_ids`, `rejected_ids` and, optionally, a `margin`.

        Returns:
            `input_ids` and `attention_mask` `[2·B, T]`, and `margin` `[B]`.

        Raises:
            ValueError: if a row lacks a column.
        """
        for row in rows:
            if not {"chosen_ids", "rejected_ids"} <= row.keys():
                raise ValueError(
                    f"a row has the columns {', '.join(row) or '(none)'}: expected texts or chats in chosen and "
                    "rejected, or token ids in input_ids_chosen, attention_mask_chosen, input_ids_rejected and "
                    "attention_mask_rejected"
                )
        sequences = [_ids(row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
        tokens, attention = padded(sequences, self.pad_token_id, self.pad_to_multiple_of)
        batch = {"input_ids": tokens, "attention_mask": attention}
        if "margin" in rows[0]:
            batch["margin"] = torch.tensor([float(row["margin"]) for row in rows])
        return batch


class AnswerCollator:
    """Pads prompts with their answers to one batch: rows of the first answer column first, then of the next.

    Args:
        answers: names of the columns that hold answers.
        pad_token_id: fills padding, which is masked: any id works.
        decoder_start: the decoder's start token, for an encoder-decoder; None for a decoder-only model.
        floats: names of columns of one number a row, collated as float32 `[B]` where the rows have them.
        pad_to_multiple_of: makes the number of columns a multiple of this.
    """

    def __init__(
        self,
        answers: Sequence[str],
        *,
        pad_token_id: int,
        decoder_start: int | None = None,
        floats: Sequence[str] = (),
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.answers = tuple(answers)
        self.pad_token_id = pad_token_id
        self.decoder_start = decoder_start
        self.floats = tuple(floats)
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates `B` rows with `n` answers each.

        Returns:
            `input_ids` and `attention_mask` `[n·B, T]`, and `completion_mask` `[n·B, T]`, 1 on answers; for an
            encoder-decoder the prompts, and `decoder_input_ids`, `decoder_attention_mask` and `completion_mask` of the
            start token and the answer. Then the columns of `floats`, and `label` as bool.
        """
        pairs = [(_ids(row["prompt_ids"]), _ids(row[answer])) for answer in self.answers for row in rows]
        fill = self.pad_token_id, self.pad_to_multiple_of
        batch: dict[str, Tensor] = {}
        if self.decoder_start is None:
            batch["input_ids"], batch["attention_mask"] = padded([torch.cat(pair) for pair in pairs], *fill)
            before = torch.tensor([len(prompt) for prompt, _ in pairs])
            attention = batch["attention_mask"]
        else:
            start = torch.tensor([self.decoder_start])
            batch["input_ids"], batch["attention_mask"] = padded([prompt for prompt, _ in pairs], *fill)
            decoded = padded([torch.cat([start, answer]) for _, answer in pairs], *fill)
            batch["decoder_input_ids"], batch["decoder_attention_mask"] = decoded
            before, attention = torch.ones(len(pairs), dtype=torch.int64), decoded[1]
        columns = torch.arange(attention.shape[1])
        batch["completion_mask"] = attention * (columns >= before[:, None])
        for name in self.floats:
            if name in rows[0]:
                batch[name] = torch.tensor([float(row[name]) for row in rows])
        if "label" in rows[0]:
            batch["label"] = torch.tensor([bool(row["label"]) for row in rows])
        return batch


def padded(sequences: Sequence[Tensor], pad_token_id: int, multiple: int | None) -> tuple[Tensor, Tensor]:
    """Pads on the right, to a multiple of columns: `[B, T]` tokens and `[B, T]` attention."""
    tokens, attention = pad(sequences, pad_token_id, "right")
    extra = (0, -tokens.shape[1] % multiple if multiple else 0)
    return F.pad(tokens, extra, value=pad_token_id), F.pad(attention, extra)


def _ids(tokens: Any) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64)
