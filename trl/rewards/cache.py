"""Score caching, in memory or in a file, so that equal samples are scored once."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl.protocols import Reward
from trl.rewards.failures import ColumnError
from trl.types import Sample, Scored

logger = logging.getLogger(__name__)


class ScoreCache:
    """LRU cache of JSON values, optionally persisted to a file.

    The file is append-only JSONL, one entry per line; a torn last line left by a killed process is skipped. Only one
    process may write to a file at a time, and a file must belong to one reward with one set of settings.

    Args:
        path: JSONL file, created with its folder if missing; None keeps entries in memory only.
        most: maximum number of entries in memory; the least recently used is evicted first.

    Raises:
        ValueError: if `most` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, most: int = 1_000_000) -> None:
        if most < 1:
            raise ValueError(f"most={most!r} must be a whole number of at least 1")
        self.path = None if path is None else Path(path)
        self.most = most
        self._entries: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._load()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Any:
        """Returns the value stored under `key`, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: str, value: Any) -> None:
        """Stores `value`, which must be JSON-serializable and not None, under `key`."""
        with self._lock:
            self._insert(key, value)
            if self.path is not None:
                with self.path.open("a", encoding="ascii") as file:
                    file.write(json.dumps([key, value]) + "\n")

    def _insert(self, key: str, value: Any) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self.most:
            self._entries.popitem(last=False)

    def _load(self) -> None:
        assert self.path is not None
        if not self.path.exists():
            return
        invalid_lines = 0
        data = self.path.read_bytes()
        for line in data.splitlines():
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                invalid_lines += 1
            else:
                self._insert(str(key), value)
        if invalid_lines:
            logger.warning("%s: skipped %d lines that are not score cache entries", self.path, invalid_lines)
        if data and not data.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")  # otherwise the next entry would be appended to the torn line


def key_of(*parts: Any) -> str:
    """Hashes JSON-serializable values into a cache key.

    Raises:
        TypeError: if a part is not JSON-serializable.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class CachedReward:
    """Caches a deterministic reward, so that equal samples are scored once.

    The key is the prompt, the completion, the columns and the number of completion tokens. Failures are not cached.

    Args:
        reward: scores the samples that are not cached yet.
        cache: cache of the scores; None creates one in memory.
        columns: columns that the score depends on; None is all.
        ids: whether the score also depends on the token ids.
    """

    def __init__(
        self,
        reward: Reward,
        cache: ScoreCache | None = None,
        *,
        columns: Sequence[str] | None = None,
        ids: bool = False,
    ) -> None:
        self.reward = reward
        self.cache = ScoreCache() if cache is None else cache
        self.columns = columns
        self.ids = ids

    def score(self, samples: Sequence[Sample]) -> Scored:
        """Scores samples, passing only the first uncached sample of each key to the reward.

        Raises:
            ColumnError: if a column is not JSON-serializable.
        """
        keys = [self._key(sample) for sample in samples]
        entries_by_key = {key: self.cache.get(key) for key in keys}
        first_rows = {key: i for i, key in reversed(list(enumerate(keys))) if entries_by_key[key] is None}
        uncached_rows = sorted(first_rows.values())
        scored = self.reward.score([samples[i] for i in uncached_rows])
        position_of = {keys[i]: position for position, i in enumerate(uncached_rows)}
        for key, position in position_of.items():
            entries_by_key[key] = _entry(scored, position)
            if scored.errors[position] is None:
                self.cache.put(key, entries_by_key[key])
        entries = [entries_by_key[key] for key in keys]
        tracebacks = scored.tracebacks or scored.errors
        names = list(dict.fromkeys([*scored.components, *(name for entry in entries for name in entry["components"])]))
        return replace(
            scored,
            scores=[entry["score"] for entry in entries],
            components={name: [entry["components"].get(name) for entry in entries] for name in names},
            token_rewards=[entry["tokens"] for entry in entries],
            seconds=[
                scored.seconds[position_of[key]] if first_rows.get(key) == i else 0.0 for i, key in enumerate(keys)
            ],
            errors=[scored.errors[position_of[key]] if key in position_of else None for key in keys],
            tracebacks=[tracebacks[position_of[key]] if key in position_of else None for key in keys],
        )

    def close(self) -> None:
        """Closes the reward."""
        self.reward.close()

    def _key(self, sample: Sample) -> str:
        names = sample.columns if self.columns is None else self.columns
        columns = {name: sample.columns.get(name) for name in names}
        # Token rewards do not transfer to the same text tokenized to a different length.
        ids = [sample.prompt_ids, sample.completion_ids] if self.ids else len(sample.completion_ids)
        try:
            return key_of(sample.prompt, sample.completion, columns, ids)
        except (TypeError, ValueError) as error:
            raise ColumnError(
                f"a column ({', '.join(columns)}) cannot be part of a cache key, which must be JSON: {error}; "
                "CachedReward(columns=...) selects the columns that the score depends on"
            ) from error


def _entry(scored: Scored, i: int) -> dict[str, Any]:
    components = {name: values[i] for name, values in scored.components.items()}
    return {"score": scored.scores[i], "components": components, "tokens": scored.token_rewards[i]}
