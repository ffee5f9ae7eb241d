"""Scores that are kept, so that the same text is scored once."""

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
    """A bounded memory of JSON values by key, optionally in a file that outlives the process.

    The file is JSONL, one entry a line, appended to: what a killed process leaves of a last line is passed over. One
    process writes to a file at a time; a file must belong to one reward with one set of settings.

    Args:
        path: of the file; made, with its folder, if there is none. None keeps nothing beyond the process.
        most: entries in memory; the one not used for longest goes first.

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
        """What was put under `key`; None if there is nothing."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: str, value: Any) -> None:
        """Keeps `value`, which is JSON and not None, under `key`."""
        with self._lock:
            self._keep(key, value)
            if self.path is not None:
                with self.path.open("a", encoding="ascii") as file:
                    file.write(json.dumps([key, value]) + "\n")

    def _keep(self, key: str, value: Any) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self.most:
            self._entries.popitem(last=False)

    def _load(self) -> None:
        assert self.path is not None
        if not self.path.exists():
            return
        torn = 0
        data = self.path.read_bytes()
        for line in data.splitlines():
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                torn += 1
            else:
                self._keep(str(key), value)
        if torn:
            logger.warning("%s: %d lines are no entries of a score cache and are passed over", self.path, torn)
        if data and not data.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")  # else the next entry would be lost with the torn one


def key_of(*parts: Any) -> str:
    """A key of anything that JSON can say.

    Raises:
        TypeError: if it cannot say it.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class CachedReward:
    """A reward that scores each text once.

    The key is prompt, completion, columns and the number of completion tokens. Samples that failed are scored again when they come again. For rewards
    that always say the same about the same text.

    Args:
        reward: what scores the texts that are new.
        cache: of its scores; None keeps them in memory.
        columns: those that the score depends on; None is all.
        ids: whether the score depends on the token ids, too.
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
        """Scores samples; of those with the same key the first alone goes to the reward.

        Raises:
            ColumnError: if a column cannot be part of a key.
        """
        keys = [self._key(sample) for sample in samples]
        found = {key: self.cache.get(key) for key in keys}
        first = {key: i for i, key in reversed(list(enumerate(keys))) if found[key] is None}
        new = sorted(first.values())
        fresh = self.reward.score([samples[i] for i in new])
        place = {keys[i]: position for position, i in enumerate(new)}
        for key, position in place.items():
            found[key] = _entry(fresh, position)
            if fresh.errors[position] is None:
                self.cache.put(key, found[key])
        entries = [found[key] for key in keys]
        tracebacks = fresh.tracebacks or fresh.errors
        names = list(dict.fromkeys([*fresh.components, *(name for entry in entries for name in entry["components"])]))
        return replace(
            fresh,
            scores=[entry["score"] for entry in entries],
            components={name: [entry["components"].get(name) for entry in entries] for name in names},
            token_rewards=[entry["tokens"] for entry in entries],
            seconds=[fresh.seconds[place[key]] if first.get(key) == i else 0.0 for i, key in enumerate(keys)],
            errors=[fresh.errors[place[key]] if key in place else None for key in keys],
            tracebacks=[tracebacks[place[key]] if key in place else None for key in keys],
        )

    def close(self) -> None:
        """Closes the reward."""
        self.reward.close()

    def _key(self, sample: Sample) -> str:
        names = sample.columns if self.columns is None else self.columns
        columns = {name: sample.columns.get(name) for name in names}
        # Rewards of tokens do not carry over to the same text in another number of them.
        ids = [sample.prompt_ids, sample.completion_ids] if self.ids else len(sample.completion_ids)
        try:
            return key_of(sample.prompt, sample.completion, columns, ids)
        except (TypeError, ValueError) as error:
            raise ColumnError(f"a column ({', '.join(columns)}) cannot be part of a cache's key: {error}") from error


def _entry(scored: Scored, i: int) -> dict[str, Any]:
    components = {name: values[i] for name, values in scored.components.items()}
    return {"score": scored.scores[i], "components": components, "tokens": scored.token_rewards[i]}
