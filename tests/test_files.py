from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl.files import append_line, write_atomic


def full_after(count: int, real: Callable[..., int] = os.write) -> Callable[[int, Any], int]:
    """An `os.write` for a disk on which `count` more bytes find room, a few at a time."""
    room = [count]

    def write(descriptor: int, data: Any) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, data[: min(3, room[0])])
        room[0] -= written
        return written

    return write


def test_write_atomic_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    write_atomic(path, b"a long first content")
    write_atomic(str(path), b"second\n")
    assert path.read_bytes() == b"second\n"
    assert os.listdir(tmp_path) == [path.name]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_order_of_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content on disk before the name, and the name on disk before the call returns."""
    calls: list[str] = []
    folders: set[int] = set()
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, *args, **kwargs)
        folders.discard(descriptor)
        if Path(path) == tmp_path:
            folders.add(descriptor)
        return descriptor

    def synced(descriptor: int) -> None:
        real_fsync(descriptor)
        size = os.fstat(descriptor).st_size
        calls.append("fsync folder" if descriptor in folders else f"fsync file of {size} bytes")

    def replaced(source: Any, target: Any) -> None:
        real_replace(source, target)
        calls.append("rename")

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomic(tmp_path / "a", b"12345")
    assert calls == ["fsync file of 5 bytes", "rename", "fsync folder"]


@pytest.mark.parametrize("room", [0, 1, 7])
def test_full_disk_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    write_atomic(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "write", full_after(room))
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "a", b"new content")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", full_after(100))
    write_atomic(tmp_path / "a", b"0123456789")
    append_line(tmp_path / "a", "abcdefg")
    assert (tmp_path / "a").read_bytes() == b"0123456789abcdefg\n"


def test_append_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, "first")
    append_line(str(path), "zweite é")
    assert path.read_bytes() == "first\nzweite é\n".encode()
    for text in ("two\nlines", "two\rlines"):
        with pytest.raises(ValueError, match="must not hold a line break"):
            append_line(path, text)


@pytest.mark.parametrize("room", [0, 1, 5])
def test_full_disk_leaves_no_half_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = tmp_path / "log"
    append_line(path, "first")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full_after(room))
        with pytest.raises(OSError, match="No space left"):
            append_line(path, "second")
    append_line(path, "third")
    assert path.read_bytes() == b"first\nthird\n"
