"""Names of runs become folders, and never one outside their root."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

_LONGEST = 255  # bytes of one part of a path, on nearly every file system


def run_folder(name: str | Path, root: str | Path | None = None) -> Path:
    """The folder of a run; nothing is made.

    Args:
        name: a path. With `root`, it must lie inside of it, symbolic links followed.
        root: where runs live; None takes `name` as any path.

    Returns:
        An absolute path, its symbolic links resolved.

    Raises:
        ValueError: if `name` is empty, holds control characters or a part of more than 255 bytes; with `root`, also if it
            is absolute, has a `..`, is `root` itself, or leads out of it through a symbolic link.
    """
    text = str(name)
    shown = repr(text if len(text) <= 80 else text[:80] + "...")
    if not text:
        raise ValueError("the name of a run is empty")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(f"run name {shown} holds control characters")
    longest = max((len(part.encode("utf-8")) for part in Path(text).parts), default=0)
    if longest > _LONGEST:
        raise ValueError(f"run name {shown} has a part of {longest} bytes; the longest allowed is {_LONGEST}")
    if root is None:
        return _resolved(Path(text), shown)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor:
        raise ValueError(f"run name {shown} is absolute; it must lie inside {root}")
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        raise ValueError(f"run name {shown} has a '..'; it must lie inside {root}")
    base = _resolved(Path(root), repr(str(root)))
    folder = _resolved(base / text, shown)
    if folder == base or not folder.is_relative_to(base):
        where = "is the root itself" if folder == base else f"leads to {folder} through a symbolic link"
        raise ValueError(f"run name {shown} {where}; it must lie inside {base}")
    return folder


def _resolved(path: Path, shown: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of symbolic links, or too long a path
        raise ValueError(f"run name {shown} cannot be resolved: {error}") from error
