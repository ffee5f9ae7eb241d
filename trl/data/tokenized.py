"""Rows of tokens for supervised training: a compact data set, and packing several sequences into one row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch.utils.data

from trl.data.readers import Located

IGNORED = -100  # label of a token that is not in the loss
Strategy = Literal["bfd", "bfd_split", "wrapped"]
STRATEGIES = ("bfd", "bfd_split", "wrapped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One row: its tokens, and which of them are in the loss."""

    ids: Sequence[int]
    counted: Sequence[bool]
    prompt: Sequence[int] | None = None  # what an encoder reads
    location: str = "the row"


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a sequence in a packed row."""

    row: int
    start: int  # in the sequence
    stop: int


class TokenRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Token ids and labels of all rows, in a few arrays: 5 bytes per token.

    A row is a mapping of lists: `input_ids`, `labels` (-100: not in the loss), for an encoder-decoder `prompt_ids`, and
    in packed data `seq_lengths`.

    Args:
        rows: the tokens of each row.
    """

    def __init__(self, rows: Iterable[Tokens]) -> None:
        ids: list[np.ndarray[Any, Any]] = []
        counted: list[np.ndarray[Any, Any]] = []
        self._prompts: list[np.ndarray[Any, Any]] = []
        for row in rows:
            ids.append(np.asarray(row.ids, dtype=np.int32))
            counted.append(np.asarray(row.counted, dtype=bool))
            if row.prompt is not None:
                self._prompts.append(np.asarray(row.prompt, dtype=np.int32))
        self.lengths = [len(row) for row in ids]
        self._starts = np.cumsum([0, *self.lengths])
        self._ids = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
        self._counted = np.concatenate(counted) if counted else np.zeros(0, dtype=bool)
        self._packs: list[list[Piece]] | None = None

    @property
    def column_names(self) -> list[str]:
        """Names of a row's entries."""
        more = (["prompt_ids"] if self._prompts else []) + (["seq_lengths"] if self._packs is not None else [])
        return ["input_ids", "labels", *more]

    def __len__(self) -> int:
        return len(self.lengths) if self._packs is None else len(self._packs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if self._packs is None:
            row = index % len(self)
            ids, labels = self._labelled(Piece(row, 0, self.lengths[row]))
            prompt = {"prompt_ids": self._prompts[row].tolist()} if self._prompts else {}
            return {"input_ids": ids, "labels": labels} | prompt
        pieces = self._packs[index]
        parts = [self._labelled(piece) for piece in pieces]
        for _, labels in parts:
            labels[0] = IGNORED  # it would be predicted from another sequence
        return {
            "input_ids": [token for ids, _ in parts for token in ids],
            "labels": [label for _, labels in parts for label in labels],
            "seq_lengths": [piece.stop - piece.start for piece in pieces],
        }

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))

    def _labelled(self, piece: Piece) -> tuple[list[int], list[int]]:
        start = self._starts[piece.row]
        span = slice(start + piece.start, start + piece.stop)
        ids = self._ids[span]
        return ids.tolist(), np.where(self._counted[span], ids, IGNORED).tolist()

    def pack(self, length: int, strategy: Strategy) -> TokenRows:
        """Returns the same sequences, packed into rows of at most `length` tokens; shares the arrays."""
        packed = object.__new__(TokenRows)
        vars(packed).update(vars(self), _packs=pack(self.lengths, length, strategy))
        return packed


class StreamedRows(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Rows of a stream, encoded as they are read and packed among the rows of a chunk.

    Args:
        source: yields located rows, the same ones each time it is called.
        encode: turns located rows into tokens.
        finish: turns the rows of a chunk into the data set of what is yielded, such as packed rows.
        chunk: rows per chunk.
    """

    def __init__(
        self,
        source: Callable[[], Iterable[Located]],
        encode: Callable[[Iterable[Located]], Iterator[Tokens]],
        finish: Callable[[TokenRows], TokenRows],
        chunk: int = 1000,
    ) -> None:
        self.source, self.encode, self.finish, self.chunk = source, encode, finish, chunk

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rows = iter(self.source())
        while part := list(islice(rows, self.chunk)):
            yield from self.finish(TokenRows(self.encode(part)))


def pack(lengths: Sequence[int], capacity: int, strategy: Strategy = "bfd") -> list[list[Piece]]:
    """Distributes sequences over rows of at most `capacity` tokens. The pieces of a row never attend to each other.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens of a row.
        strategy: "bfd": best fit, longest sequence first; longer sequences lose their end. "bfd_split": longer
            sequences are split instead. "wrapped": sequences in order, split wherever a row is full.

    Returns:
        The pieces of each row.

    Raises:
        ValueError: if the strategy is unknown or the capacity not positive.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"packing_strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    if capacity < 1:
        raise ValueError(f"max_length={capacity} must be at least 1 to pack")
    if strategy == "wrapped":
        return _wrapped(lengths, capacity)
    pieces = []
    for row, length in enumerate(lengths):
        end = min(length, capacity) if strategy == "bfd" else length
        pieces += [Piece(row, start, min(start + capacity, end)) for start in range(0, end, capacity)]
    pieces.sort(key=lambda piece: piece.start - piece.stop)
    rows: list[list[Piece]] = []
    spaces = _Spaces()
    for piece in pieces:
        size = piece.stop - piece.start
        row, space = spaces.take(size) or (len(rows), capacity)
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        spaces.add(row, space - size)
    return rows


@dataclass(slots=True)
class _Spaces:
    """Rows by the space that is left in them."""

    sizes: list[int] = field(default_factory=list)  # sorted, without repetitions
    rows: dict[int, list[int]] = field(default_factory=dict)

    def add(self, row: int, size: int) -> None:
        if size and size not in self.rows:
            insort(self.sizes, size)
        if size:
            self.rows.setdefault(size, []).append(row)

    def take(self, size: int) -> tuple[int, int] | None:
        """Removes and returns the row with the least space of at least `size`, and that space."""
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            return None
        space = self.sizes[place]
        row = self.rows[space].pop()
        if not self.rows[space]:
            del self.rows[space], self.sizes[place]
        return row, space


def _wrapped(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    space = 0
    for row, length in enumerate(lengths):
        start = 0
        while start < length:
            if not space:
                rows.append([])
                space = capacity
            stop = min(length, start + space)
            rows[-1].append(Piece(row, start, stop))
            space -= stop - start
            start = stop
    return rows
