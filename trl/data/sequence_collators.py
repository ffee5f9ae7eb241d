"""Collators of token rows with labels: padded, joined without padding, and with the loss on completions alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from trl.data.collators import Side, pad
from trl.data.tokenized import IGNORED

_SHOWN_CHARACTERS = 300


class SequenceCollator:
    """Collates rows with `input_ids` and `labels`; rows without labels are counted whole.

    Padded batches have `input_ids`, `attention_mask` and `labels` `[B, T]`. Joined batches have one row `[1, T]` and
    `position_ids`, which begin at 0 in each sequence. Rows with `prompt_ids` become batches of an encoder-decoder:
    prompts as `input_ids`, completions as `labels`.

    Args:
        pad_token_id: the padding token.
        join: join rows instead of padding them; packed rows (`seq_lengths`) are joined in any case.
        multiple: pad to a multiple of this many tokens.
        side: side to pad on.
    """

    def __init__(
        self, pad_token_id: int, *, join: bool = False, multiple: int | None = None, side: Side = "right"
    ) -> None:
        self.pad_token_id, self.join, self.multiple, self.side = pad_token_id, join, multiple, side

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collates examples into a batch."""
        ids = [torch.as_tensor(example["input_ids"]) for example in examples]
        labels = [torch.as_tensor(example.get("labels", example["input_ids"])) for example in examples]
        if "prompt_ids" in examples[0]:
            tokens, attention = pad([torch.as_tensor(e["prompt_ids"]) for e in examples], self.pad_token_id, "right")
            return {"input_ids": tokens, "attention_mask": attention, "labels": pad(labels, IGNORED, "right")[0]}
        if self.join or "seq_lengths" in examples[0]:
            lengths = [e.get("seq_lengths", [len(row)]) for e, row in zip(examples, ids, strict=True)]
            return join(ids, labels, [length for row in lengths for length in row])
        if self.multiple is not None:
            longest = -(-max(map(len, ids)) // self.multiple) * self.multiple
            ids, labels = (
                [*ids, torch.zeros(longest, dtype=torch.int64)],
                [*labels, torch.zeros(longest, dtype=torch.int64)],
            )
        tokens, attention = pad(ids, self.pad_token_id, self.side)
        batch = {"input_ids": tokens, "attention_mask": attention, "labels": pad(labels, IGNORED, self.side)[0]}
        return {name: value[: len(examples)] for name, value in batch.items()}


def join(ids: Sequence[Tensor], labels: Sequence[Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    """Joins rows of tokens into one row `[1, T]`.

    Args:
        ids: tokens of each row.
        labels: labels of each row.
        lengths: tokens of each sequence; a row may hold several.

    Returns:
        `input_ids`, `labels` (-100 at the beginning of each sequence) and `position_ids`, each `[1, T]`.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])
    joined = torch.cat(list(labels)).masked_fill(positions == 0, IGNORED)
    return {"input_ids": torch.cat(list(ids))[None], "labels": joined[None], "position_ids": positions[None]}


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Pads texts and counts the loss on what follows a template, as in TRL 0.4 to 0.19.

    Without an instruction template everything up to the end of the last response template is left out of the loss. With
    one, each answer counts, from the end of its response template to the beginning of the next instruction template.
    Padding is left out by position, so that an end-of-sequence token counts even where it is the padding token, too.

    Args:
        response_template: text or token ids that precede an answer.
        instruction_template: text or token ids that precede an instruction; for chats of several turns. TRL 0.4.6 had
            the tokenizer in this place, which is accepted.
        *args: the tokenizer, if not given by name.
        mlm: must be False.
        ignore_index: label of tokens that do not count; must be -100.
        padding_free: join the texts of a batch instead of padding them.
        tokenizer: the tokenizer.
        pad_to_multiple_of: pad to a multiple of this many tokens.

    Raises:
        ValueError: if there is no tokenizer, or an argument is not supported.
    """

    def __init__(
        self,
        response_template: str | Sequence[int],
        instruction_template: str | Sequence[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = IGNORED,
        padding_free: bool = False,
        tokenizer: Any = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        given: list[Any] = list(args)
        if isinstance(instruction_template, PreTrainedTokenizerBase):
            given.insert(0, instruction_template)
            instruction_template = None
        if given and tokenizer is None:
            tokenizer = given.pop(0)
        if given:
            mlm = given.pop(0)
        if given:
            raise ValueError(f"DataCollatorForCompletionOnlyLM got {len(given)} more arguments than it has: {given}")
        if tokenizer is None:
            raise ValueError("DataCollatorForCompletionOnlyLM needs the tokenizer: pass tokenizer=...")
        if mlm:
            raise ValueError("mlm=True is not supported: this collator is for models that predict the next token")
        if ignore_index != IGNORED:
            raise ValueError(
                f"ignore_index={ignore_index} is not supported: transformers leaves out tokens labelled {IGNORED}"
            )
        if tokenizer.pad_token_id is None and not padding_free:
            raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer, self.mlm, self.pad_to_multiple_of = tokenizer, False, pad_to_multiple_of
        self.mlm_probability, self.return_tensors, self.seed = None, "pt", None
        self.ignore_index, self.padding_free = ignore_index, padding_free
        self.response_template, self.instruction_template = response_template, instruction_template
        self.response_token_ids = self._ids("response_template", response_template)
        self.instruction_token_ids = (
            None if instruction_template is None else self._ids("instruction_template", instruction_template)
        )

    def _ids(self, name: str, template: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else list(template)
        if not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"{name}={template!r} must be a text or a list of token ids, and not empty")
        return ids

    def __call__(self, features: Sequence[Any], return_tensors: str | None = None) -> dict[str, Any]:
        """Collates texts of token ids into a batch of `input_ids`, `attention_mask` and `labels`."""
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported: use 'pt'")
        return self.torch_call(list(features))

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """Collates texts of token ids.

        Raises:
            RuntimeError: if a text has no response template; shows the text.
        """
        rows = [example["input_ids"] if isinstance(example, Mapping) else example for example in examples]
        ids = [torch.as_tensor(row) for row in rows]
        labels = [self._labels(row.tolist(), index) for index, row in enumerate(ids)]
        collator = SequenceCollator(
            self.tokenizer.pad_token_id or 0,
            join=self.padding_free,
            multiple=self.pad_to_multiple_of,
            side=self.tokenizer.padding_side,
        )
        return collator([{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)])

    def _labels(self, ids: list[int], index: int) -> list[int]:
        starts = [place + len(self.response_token_ids) for place in _places(ids, self.response_token_ids)]
        if not starts:
            raise RuntimeError(
                self._missing("response_template", self.response_template, self.response_token_ids, ids, index)
            )
        labels = [IGNORED] * len(ids)
        if self.instruction_token_ids is None:
            labels[starts[-1] :] = ids[starts[-1] :]
            return labels
        instructions = _places(ids, self.instruction_token_ids)
        if not instructions:
            name, template = "instruction_template", self.instruction_template
            raise RuntimeError(self._missing(name, template, self.instruction_token_ids, ids, index))
        for start in starts:
            end = next((place for place in instructions if place >= start), len(ids))
            labels[start:end] = ids[start:end]
        return labels

    def _missing(self, name: str, template: Any, tokens: list[int], ids: list[int], index: int) -> str:
        text = self.tokenizer.decode(ids)
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        hint = "the text may have been truncated in front of it"
        if isinstance(template, str) and template.strip() in text:
            hint = (
                "the text has it, but as other tokens, since they depend on what precedes them: pass the token ids of "
                "the template inside a text, such as tokenizer.encode(text)[start:stop]"
            )
        return (
            f"text {index} of the batch has no {name} {template!r} (token ids {tokens}): {shown!r}. Either {hint}, or "
            "leave the row out"
        )


def _places(ids: Sequence[int], template: Sequence[int]) -> list[int]:
    """Returns where `template` occurs in `ids`."""
    size = len(template)
    return [place for place in range(len(ids) - size + 1) if list(ids[place : place + size]) == list(template)]
