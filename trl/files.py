"""Files that a stopped process leaves whole. Standard library only.

Everything goes through the few calls of `os` below, so that a test can stop after every single one of them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STAGING = ".staging-"  # how the names of unfinished files and folders begin; what a stopped process left can be removed
_PIECE = 8 * 2**20  # bytes per call of os.write and per update of a hash


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of calls that take a descriptor say which file they are about, too."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: str | Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file piece by piece and waits until the disk has it.

    Args:
        path: must not exist.
        pieces: its bytes, in order.

    Returns:
        Its size in bytes and its SHA-256, of what was written.

    Raises:
        OSError: with the path, as every function here.
    """
    path, size, digest = Path(path), 0, hashlib.sha256()
    with _naming(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            for piece in pieces:
                rest = memoryview(piece).cast("B")
                while rest:
                    written = os.write(file, rest[:_PIECE])
                    digest.update(rest[:written])
                    size, rest = size + written, rest[written:]
            os.fsync(file)
        finally:
            os.close(file)
    return size, digest.hexdigest()


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(path: str | Path) -> None:
    """Waits until the disk has a folder's names: what was made, renamed or removed in it stays so."""
    if os.name == "nt":
        return  # folders cannot be opened there
    with _naming(Path(path)):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def make_folder(path: str | Path) -> None:
    """Makes a folder, and those above it, if missing."""
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
    """Renames a file or folder within its folder; a file that stood at `target` is replaced. Stays so."""
    os.replace(source, target)
    sync_folder(Path(target).parent)


def remove(path: str | Path) -> None:
    """Removes a file, a link (not what it leads to) or a folder with all that is in it."""
    path = Path(path)
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
        return
    for inner in sorted(path.iterdir()):
        remove(inner)
    os.rmdir(path)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Puts `data` at `path`: whoever reads it, also after a crash, finds the old bytes or the new ones, whole.

    Args:
        path: in an existing folder; a file there is replaced.
        data: all of it.

    Raises:
        OSError: with the path; the old bytes are still there.
    """
    path = Path(path)
    # Random, since two threads may write the same file; cut, since a name has at most 255 bytes.
    temporary = path.with_name(f"{STAGING}{path.name[:48]}-{os.urandom(6).hex()}")
    try:
        write_file(temporary, [data])
        move(temporary, path)
    except OSError:
        with suppress(OSError):  # it may not have been made
            os.unlink(temporary)
        raise


def append_line(path: str | Path, text: str) -> None:
    """Appends one line, UTF-8, and hands it to the operating system: it outlives the process, not a power cut.

    Args:
        path: in an existing folder; made if missing.
        text: without a line break.

    Raises:
        ValueError: if `text` holds a line break.
        OSError: with the path; what was written of the line is taken back.
    """
    if "\n" in text or "\r" in text:
        raise ValueError(f"a line must not hold a line break: {text[:80]!r}")
    with _naming(Path(path)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                rest = memoryview((text + "\n").encode("utf-8"))
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                os.ftruncate(file, size)  # the next line would be glued to half of this one
                raise
        finally:
            os.close(file)
