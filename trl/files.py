"""Crash-safe file operations. Standard library only.

All writes go through the few `os` calls below, so tests can simulate a crash after each one.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGING = ".staging-"  # name prefix of unfinished files and folders; leftovers of a dead process are safe to delete
_CHUNK_BYTES = 8 * 2**20  # maximum bytes per os.write call and per hash update


@contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """Adds the path to OSErrors from calls that take a file descriptor."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: str | Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file piece by piece and syncs it to disk.

    Args:
        path: must not exist.
        pieces: the file's bytes, in order.

    Returns:
        Size in bytes and SHA-256 of the data written.

    Raises:
        OSError: naming the path, as in every function here.
    """
    path, size, digest = Path(path), 0, hashlib.sha256()
    with _with_path(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for piece in pieces:
                remaining = memoryview(piece).cast("B")
                while remaining:
                    written = os.write(file, remaining[:_CHUNK_BYTES])
                    digest.update(remaining[:written])
                    size, remaining = size + written, remaining[written:]
            os.fsync(file)
        finally:
            os.close(file)
    return size, digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(path: str | Path) -> None:
    """Syncs a folder's entries to disk, making creations, renames and removals in it durable. No-op on Windows."""
    if os.name == "nt":
        return  # Windows cannot open folders
    with _with_path(Path(path)):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def sync_tree(path: str | Path) -> None:
    """Syncs all files and folders below a folder, and the folder itself, to disk."""
    for entry in sorted(Path(path).iterdir()):
        if entry.is_dir():
            sync_tree(entry)
        else:
            with entry.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(path)


def make_folder(path: str | Path) -> None:
    """Creates a folder and any missing parents, durably."""
    path = Path(path)
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_folder(path.parent)


def move(source: str | Path, target: str | Path) -> None:
    """Durably renames a file or folder within its folder, replacing any file at `target`."""
    os.replace(source, target)
    sync_folder(Path(target).parent)


def remove(path: str | Path) -> None:
    """Removes a file, a symlink (not its target) or a folder with its contents."""
    path = Path(path)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        remove(entry)
    os.rmdir(path)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path` atomically: readers see all of the old contents or all of the new, even after a crash.

    Args:
        path: in an existing folder; an existing file is replaced.
        data: the complete contents.

    Raises:
        OSError: naming the path; the old contents are intact.
    """
    path = Path(path)
    # Random, because two threads may write the same file; truncated, because names are limited to 255 bytes.
    temporary = path.with_name(f"{STAGING}{path.name[:48]}-{os.urandom(6).hex()}")
    try:
        write_file(temporary, [data])
        move(temporary, path)
    except OSError:
        with suppress(OSError):  # it may not exist
            os.unlink(temporary)
        raise


def append_line(path: str | Path, text: str) -> None:
    """Appends one UTF-8 line, unbuffered but not synced: it survives a crash of the process, not a power failure.

    Args:
        path: in an existing folder; created if missing.
        text: without line breaks.

    Raises:
        ValueError: if `text` contains a line break.
        OSError: naming the path; a partly written line is removed.
    """
    if "\n" in text or "\r" in text:
        raise ValueError(f"a line must not contain a line break: {text[:80]!r}")
    with _with_path(Path(path)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                remaining = memoryview((text + "\n").encode("utf-8"))
                while remaining:
                    remaining = remaining[os.write(file, remaining) :]
            except OSError:
                os.ftruncate(file, size)  # or the next line would be appended to half of this one
                raise
        finally:
            os.close(file)
