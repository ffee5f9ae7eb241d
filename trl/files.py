"""Writing that survives: a file is there whole or not at all, a line is appended whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

# Between the name of a file and the name under which it is written first.
_TEMPORARY = ".tmp"


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes a file so that whoever looks sees the old content or the new, never a part: also after a power cut.

    Args:
        path: in an existing folder; what is there is replaced.
        data: the whole content.

    Raises:
        OSError: if the disk is full or read-only; the old file is untouched and nothing is left beside it.
    """
    path = Path(path)
    # Random, since two threads may write the same file; cut, since a name has at most 255 bytes.
    temporary = path.with_name(f".{path.name[:48]}.{os.urandom(6).hex()}{_TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_line(path: str | Path, text: str) -> None:
    """Appends one line, UTF-8, and hands it to the operating system: it outlives the process, not a power cut.

    Args:
        path: in an existing folder; made if missing.
        text: without a line break.

    Raises:
        ValueError: if `text` holds a line break.
        OSError: if the disk is full or read-only; what was written of the line is taken back.
    """
    if "\n" in text or "\r" in text:
        raise ValueError(f"a line must not hold a line break: {text[:80]!r}")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, (text + "\n").encode("utf-8"))
        except OSError:
            os.ftruncate(descriptor, size)  # the next line would be glued to half of this one
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` durable; Windows cannot open a folder, and does this by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
