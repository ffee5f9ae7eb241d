"""Files that are whole or not there, and lines."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.disks import Disk, Stopped, use
from trl import files
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
        with pytest.raises(ValueError, match="must not contain a line break"):
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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.json"
    files.write_atomic(target, b"old")
    with monkeypatch.context() as patch:
        log = use(patch, Disk()).log
        files.write_atomic(target, b"new" * 1000)
    assert [name for name, _ in log] == ["write", "fsync", "replace", "fsync"]
    for stop in range(len(log)):
        files.write_atomic(target, b"old")
        with monkeypatch.context() as patch:
            disk = use(patch, Disk(stop_after=stop))
            with pytest.raises(Stopped):
                files.write_atomic(target, b"new" * 1000)
        disk.lose_power()
        assert target.read_bytes() == (b"old" if stop < 3 else b"new" * 1000)


@pytest.mark.parametrize("disk", [Disk(full_after=0), Disk(read_only=True)])
def test_a_failed_write_names_the_file_and_leaves_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    target = tmp_path / "x.json"
    files.write_atomic(target, b"old")
    with monkeypatch.context() as patch:
        use(patch, disk)
        with pytest.raises(OSError, match=r"x\.json"):
            files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    if not disk.read_only:
        assert list(tmp_path.iterdir()) == [target]


def test_pieces_of_any_size_are_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the system takes fewer bytes than it was given."""

    class Slow(Disk):
        def _watched(self, name: str):
            call = super()._watched(name)
            return (lambda file, data: call(file, data[:7])) if name == "write" else call

    use(monkeypatch, Slow())
    data = os.urandom(1000)
    size, digest = files.write_file(tmp_path / "x", [data[:0], memoryview(data)[:13], data[13:]])
    assert (tmp_path / "x").read_bytes() == data
    assert (size, digest) == (1000, hashlib.sha256(data).hexdigest()) == (1000, files.sha256_of(tmp_path / "x"))
    files.append_line(tmp_path / "lines", "a line that is long")
    assert (tmp_path / "lines").read_text() == "a line that is long\n"
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "x", [])


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "gone" / "inner").mkdir(parents=True)
    (tmp_path / "gone" / "inner" / "link").symlink_to(tmp_path / "kept")
    files.remove(tmp_path / "gone")
    assert [p.name for p in tmp_path.rglob("*")] == ["kept", "file"]
