"""Disks that stop, fill up and forget: `trl.files` sees one of these in place of `os`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir")
CHANGES = ("write", "fsync", "replace", "mkdir", "unlink", "rmdir")


class Stopped(BaseException):
    """The process is gone: no handler of an Exception may run after it."""


class Disk:
    """Passes calls on to `os`, counting those that change the disk, until something happens.

    Args:
        stop_after: the process is gone after this many of them.
        full_after: from this call of `write` on there is no room; what was there can still be removed.
        read_only: no change is allowed.
        exits: the process ends for real, by `os._exit`.
    """

    def __init__(
        self,
        stop_after: int | None = None,
        full_after: int | None = None,
        read_only: bool = False,
        exits: bool = False,
    ) -> None:
        self.stop_after, self.full_after, self.read_only, self.exits = stop_after, full_after, read_only, exits
        self.log: list[tuple[str, str]] = []
        self.writes = 0
        self.unsynced: set[Path] = set()  # files of which the disk may hold nothing yet
        self._paths: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        return self._watched(name) if name in CALLS else getattr(os, name)

    def _watched(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.stop_after is not None and len(self.log) >= self.stop_after:
                if self.exits:
                    os._exit(9)
                raise Stopped
            if name in CHANGES:
                self._refuse(name, args)
            result = None if name == "fsync" else getattr(os, name)(*args, **kwargs)
            self._remember(name, args, result)
            return result

        return call

    def _refuse(self, name: str, args: tuple[Any, ...]) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
        if name == "write":
            self.writes += 1
            if self.full_after is not None and self.writes > self.full_after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _remember(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._paths[result] = Path(args[0])
            return
        where = self._paths[args[0]] if isinstance(args[0], int) else Path(args[0])
        if name == "write":
            self.unsynced.add(where)
        elif name == "fsync":
            self.unsynced.discard(where)
        elif name == "replace":
            self.unsynced = {self._moved(path, where, Path(args[1])) for path in self.unsynced}
        self.log.append((name, str(where)))

    @staticmethod
    def _moved(path: Path, source: Path, target: Path) -> Path:
        return target / path.relative_to(source) if path.is_relative_to(source) else path

    def lose_power(self) -> None:
        """What was written and never synced is gone."""
        for path in self.unsynced:
            if path.exists():
                os.truncate(path, 0)


def use(monkeypatch: pytest.MonkeyPatch, disk: Disk) -> Disk:
    """All of `trl.files` works on this disk from here on."""
    monkeypatch.setattr("trl.files.os", disk)
    return disk
