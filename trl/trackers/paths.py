"""Resolves run names to folders and rejects paths that escape their root."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

_MAX_COMPONENT_BYTES = 255  # maximum bytes per path component on nearly every file system


def run_folder(name: str | Path, root: str | Path | None = None) -> Path:
    """Resolves the name of a run to its folder, without creating it.

    Args:
        name: path of the run. With `root`, it must be inside `root` after following symbolic links.
        root: parent folder of all runs; None allows any path.

    Returns:
        The absolute path with symbolic links resolved.

    Raises:
        ValueError: if `name` is empty, contains control characters or has a component longer than 255 bytes; with
            `root`, also if it is absolute, contains `..`, is `root` itself, or leaves `root` through a symbolic link.
    """
    text = str(name)
    quoted = repr(text if len(text) <= 80 else text[:80] + "...")
    if not text:
        raise ValueError("the run name is empty")
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
        raise ValueError(f"run name {quoted} contains control characters")
    longest = max((len(part.encode("utf-8")) for part in Path(text).parts), default=0)
    if longest > _MAX_COMPONENT_BYTES:
        raise ValueError(f"run name {quoted} has a component of {longest} bytes; the maximum is {_MAX_COMPONENT_BYTES}")
    if root is None:
        return _resolved(Path(text), quoted)
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor:
        raise ValueError(f"run name {quoted} is absolute; it must lie inside {root}")
    if ".." in PurePosixPath(text).parts or ".." in PureWindowsPath(text).parts:
        raise ValueError(f"run name {quoted} contains '..'; it must lie inside {root}")
    base = _resolved(Path(root), repr(str(root)))
    folder = _resolved(base / text, quoted)
    if folder == base or not folder.is_relative_to(base):
        reason = "is the root itself" if folder == base else f"leads to {folder} through a symbolic link"
        raise ValueError(f"run name {quoted} {reason}; it must lie inside {base}")
    return folder


def _resolved(path: Path, quoted: str) -> Path:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:  # symbolic link loop, or path too long
        raise ValueError(f"run name {quoted} cannot be resolved: {error}") from error
    # Since Python 3.13, `resolve` does not raise on a loop but leaves it in the path.
    if any(part.is_symlink() for part in (resolved, *resolved.parents)):
        raise ValueError(f"run name {quoted} cannot be resolved: {resolved} contains a loop of symbolic links")
    return resolved
