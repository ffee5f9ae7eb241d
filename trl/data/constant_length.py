"""`ConstantLengthDataset` of TRL 0.4 to 0.19: texts joined and cut into pieces of equal length."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class ConstantLengthDataset(IterableDataset[dict[str, Tensor]]):
    """Yields pieces of `seq_length` tokens from texts that are joined by end-of-sequence tokens.

    A piece may hold parts of several texts, which attend to each other; `SFTConfig(packing=True)` keeps them apart. The
    pieces of a buffer come in a random order, which depends on `seed` and the epoch alone.

    Args:
        tokenizer: the tokenizer.
        dataset: rows, in an order that repeats.
        dataset_text_field: column of the text, if there is no `formatting_func`.
        formatting_func: turns a row into its text.
        infinite: begin again at the end.
        seq_length: tokens of a piece.
        num_of_sequences: pieces that a buffer is estimated to hold.
        chars_per_token: characters of a token, for that estimate.
        eos_token_id: joins the texts if the tokenizer has no end-of-sequence token.
        shuffle: yield the pieces of a buffer in random order.
        append_concat_token: add the end-of-sequence token to each text.
        add_special_tokens: let the tokenizer add its special tokens to each text.
        seed: of the order.

    Raises:
        ValueError: if neither the text's column nor a function is given.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[Any], str] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        seed: int = 0,
    ) -> None:
        if dataset_text_field is None and formatting_func is None:
            raise ValueError("ConstantLengthDataset needs dataset_text_field or formatting_func, to know a row's text")
        if tokenizer.eos_token_id is None:
            warnings.warn(
                f"the tokenizer has no end-of-sequence token: texts are joined by token {eos_token_id} (eos_token_id)",
                stacklevel=2,
            )
        self.tokenizer = tokenizer
        # Token 0 is an end of sequence as good as any other.
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.dataset = dataset
        self.seq_length = seq_length
        self.infinite = infinite
        self.current_size = 0
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle, self.append_concat_token, self.add_special_tokens = (
            shuffle,
            append_concat_token,
            add_special_tokens,
        )
        self.seed, self.epoch = seed, 0
        self.dataset_text_field = dataset_text_field
        if formatting_func is not None and len(inspect.signature(formatting_func).parameters) > 1:
            warnings.warn("formatting_func has more than one argument, but is called with a row alone", stacklevel=2)
        self.formatting_func = self._text if formatting_func is None else formatting_func

    def _text(self, row: Any) -> Any:
        return row[self.dataset_text_field]

    def __len__(self) -> int:
        """Number of rows, not of pieces, which is known only after reading them."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which the order depends on; transformers calls it."""
        self.epoch = epoch

    def _buffers(self) -> Iterator[list[str]]:
        buffer: list[str] = []
        size = read = 0
        while True:
            for index, row in enumerate(self.dataset):
                text = self.formatting_func(row)
                if not isinstance(text, str):
                    raise ValueError(
                        f"dataset[{index}]: the text is {repr(text)[:80]} ({type(text).__name__}): expected a str from "
                        f"{'formatting_func' if self.dataset_text_field is None else self.dataset_text_field}"
                    )
                buffer.append(text)
                size += len(text)
                read += 1
                if size >= self.max_buffer_size:
                    yield buffer
                    buffer, size = [], 0
            if not (self.infinite and read):
                break
        if buffer:
            yield buffer

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = random.Random(f"{self.seed} {self.epoch}")  # not the global state: a resumed run finds the same order
        end = [self.concat_token_id] if self.append_concat_token else []
        for buffer in self._buffers():
            texts = self.tokenizer(buffer, add_special_tokens=self.add_special_tokens, truncation=False, verbose=False)
            ids = [token for text in texts["input_ids"] for token in (*text, *end)]
            whole = len(ids) - len(ids) % self.seq_length
            pieces = [ids[start : start + self.seq_length] for start in range(0, whole, self.seq_length)]
            if self.shuffle:
                order.shuffle(pieces)
            for piece in pieces:
                self.current_size += 1
                yield {"input_ids": torch.tensor(piece), "labels": torch.tensor(piece)}
