"""Atomic, checksummed checkpoints on disk, in safetensors and JSON only.

Layout of a checkpoint folder:

    latest.json            {"checkpoint": "step-00000012", "step": 12, "best": "step-00000009"}: for people and tools
    step-00000012/
        manifest.json      format, step, versions; size and SHA-256 of every other file; its own SHA-256
        state.json
        policy.safetensors ...
    .staging-...           unfinished; removed by the next save

Each checkpoint is written to a staging folder, synced, and renamed to `step-...`, so a folder with that name is always
complete. The newest checkpoint is the one with the highest save number in its manifest, not the highest step: a run
may be rolled back to an earlier step and continue from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trl import files
from trl.state.tensorfile import safetensors_pieces, safetensors_size

logger = logging.getLogger(__name__)

FORMAT = 1
POINTER, MANIFEST, STATE = "latest.json", "manifest.json", "state.json"
_FOLDER_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint file is missing or differs from what was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint. Its tensors are read on request."""

    path: Path
    step: int
    serial: int  # save number within its folder, from 1
    metric: float | None  # decides the best checkpoint; higher is better
    versions: Mapping[str, str]  # library versions that wrote it
    files: Mapping[str, Mapping[str, Any]]  # "bytes" and "sha256" by file name
    state: Mapping[str, Any]

    def open(self, name: str) -> Any:
        """Opens `name`.safetensors as a context manager with `keys()`, `get_slice(key)` and `get_tensor(key)`."""
        from safetensors import safe_open

        if f"{name}.safetensors" not in self.files:
            raise CheckpointError(f"{self.path} contains no {name}.safetensors; it contains {', '.join(self.files)}")
        return safe_open(self.path / f"{name}.safetensors", framework="pt")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Reads all tensors of `name`.safetensors."""
        with self.open(name) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it cannot be iterated)


# Writing -------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_last: int = 2,
    metric: float | None = None,
    keep_steps: Collection[int] = (),
) -> Path:
    """Adds a checkpoint to a folder and removes those no longer needed.

    If interrupted at any point, a complete checkpoint remains loadable: the previous one or this one. The last
    `keep_last` and the best are kept; checkpoints of later steps are removed, since the run was rolled back past them.

    Args:
        folder: holds all checkpoints of a run; created if missing. Only one process may write to it at a time.
        step: number of completed steps.
        tensors: file name (without extension) -> tensor name -> tensor. They are not copied.
        state: JSON-serializable.
        keep_last: number of recent checkpoints to keep, at least 1.
        metric: quality of this checkpoint, higher is better; if None or not finite, it is never the best.
        keep_steps: further steps whose checkpoints to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: if an argument cannot be stored.
        CheckpointError: if writing fails, for example on a full or read-only disk; earlier checkpoints stay usable.
    """
    folder = Path(folder)
    if keep_last < 1 or step < 0:
        raise ValueError(f"keep_last={keep_last} must be at least 1 and step={step} at least 0")
    for name in tensors:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"invalid name {name!r} of a tensor file: expected letters, digits, '_', '-' and '.'")
    try:
        text = json.dumps(dict(state), allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state cannot be written as JSON: {error}") from error
    size = len(text) + sum(safetensors_size(group) for group in tensors.values())
    with _checkpoint_errors(folder, step, size):
        files.make_folder(folder)
        sweep(folder)
        earlier = _readable_checkpoints(folder)
        serial = 1 + max((manifest["serial"] for _, manifest in earlier), default=0)
        target = _free_name(folder, step)
        header = {
            "format": FORMAT,
            "step": step,
            "serial": serial,
            "metric": None if metric is None or not math.isfinite(metric) else float(metric),
            "versions": versions(),
        }
        staging = folder / f"{files.STAGING}{target.name}-{os.getpid()}"
        try:
            manifest = _write_staging(staging, tensors, text, header)
            files.move(staging, target)
        except BaseException:
            _discard(staging)
            raise
    checkpoints = [(target, manifest), *earlier]
    kept_paths, best = _select_kept(checkpoints, step, keep_last)
    kept_paths |= {path for path, m in checkpoints if m["step"] in keep_steps and m["step"] <= step}
    pointer = {"checkpoint": target.name, "step": step, "best": best.name if best else None}
    with _checkpoint_errors(folder, step, size, complete=target):
        files.write_atomic(folder / POINTER, json.dumps(pointer).encode())
    for path in sorted(_folders(folder)):
        if path not in kept_paths:
            _retire(path)
    return target


def _write_staging(
    staging: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes and syncs every file of a checkpoint; returns its manifest."""
    files.make_folder(staging)
    files_written: dict[str, dict[str, Any]] = {}
    contents = {f"{name}.safetensors": safetensors_pieces(group) for name, group in tensors.items()}
    for name, pieces in (contents | {STATE: iter([state])}).items():
        size, digest = files.write_file(staging / name, pieces)
        files_written[name] = {"bytes": size, "sha256": digest}
    manifest = {**header, "files": files_written}
    files.write_file(staging / MANIFEST, [json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode()])
    files.sync_folder(staging)
    return manifest


def versions() -> dict[str, str]:
    """Versions of the libraries that a run's numbers depend on."""
    import numpy
    import torch
    import transformers

    from trl import __version__

    packages = {"trl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return packages | {"numpy": numpy.__version__}


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, independent of key order and formatting."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _free_name(folder: Path, step: int) -> Path:
    """An unused folder name for a step; a rolled-back run may repeat a step, and the old checkpoint is removed last."""
    name, suffix = f"step-{step:08d}", 2
    path = folder / name
    while os.path.lexists(path):
        path, suffix = folder / f"{name}.{suffix}", suffix + 1
    return path


def _select_kept(
    checkpoints: list[tuple[Path, dict[str, Any]]], step: int, keep_last: int
) -> tuple[set[Path], Path | None]:
    """Checkpoints to keep, and the best (earliest on ties), among the newest and those of steps before `step`."""
    candidates = [(path, m) for path, m in checkpoints if m["step"] < step or path == checkpoints[0][0]]
    candidates.sort(key=lambda entry: -entry[1]["serial"])
    ranked = [(m["metric"], -m["serial"], path) for path, m in candidates if m["metric"] is not None]
    best = max(ranked)[2] if ranked else None
    return {path for path, _ in candidates[:keep_last]} | ({best} if best else set()), best


def _retire(path: Path) -> None:
    """Removes a checkpoint, renaming it first so that a half-deleted one never looks complete."""
    try:
        retired = path.with_name(f"{files.STAGING}{path.name}-removed-{os.getpid()}")
        files.move(path, retired)
    except OSError as error:
        logger.warning("the old checkpoint %s could not be removed: %s", path, error)
    else:
        _discard(retired)


def sweep(folder: str | Path) -> None:
    """Removes leftovers of interrupted saves."""
    for path in Path(folder).glob(f"{files.STAGING}*"):
        _discard(path)


def _discard(staging: Path) -> None:
    """Removes a staging or retired folder; a failure is only logged, since leftovers cost nothing but disk space."""
    if os.path.lexists(staging):
        try:
            files.remove(staging)
        except OSError as error:
            logger.warning("%s could not be removed: %s", staging, error)


@contextmanager
def _checkpoint_errors(folder: Path, step: int, size: int, complete: Path | None = None) -> Iterator[None]:
    """Turns OSErrors into CheckpointErrors with the step, its size, the free space and the newest checkpoint left."""
    try:
        yield
    except OSError as error:
        try:
            free_space = f"{shutil.disk_usage(folder).free} bytes are free there"
        except OSError:
            free_space = f"the free space of {folder} is unknown"
        remaining = [path.name for path, _ in _readable_checkpoints(folder)]
        if complete is not None:
            remaining = [f"{complete.name} is complete and the newest checkpoint"]
        elif remaining:
            remaining = [f"{remaining[0]} remains the newest checkpoint"]
        raise CheckpointError(
            f"could not write the checkpoint of step {step} ({size} bytes): {error.strerror}: "
            f"{error.filename or folder}; {free_space}; {(remaining or ['there is no earlier checkpoint'])[0]}"
        ) from error


# Reading -------------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Loads the newest checkpoint whose checksums match.

    Damaged checkpoints are logged and skipped in favour of earlier ones.

    Args:
        folder: as for `save_checkpoint`.

    Returns:
        The checkpoint, or None if nothing was ever saved there.

    Raises:
        CheckpointError: if checkpoints exist but none is usable, or one has a newer format than this version reads.
    """
    folder = Path(folder)
    folders = _folders(folder)
    if not folders and not (folder / POINTER).exists():
        return None
    _compare_with_pointer(folder, folders)
    damaged = [str(error) for path in folders if isinstance(error := _manifest_or_error(path), DamagedCheckpoint)]
    for path, _ in _readable_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        if damaged:
            logger.warning("%s; using %s instead", "; ".join(damaged), path.name)
        return checkpoint
    raise CheckpointError(
        f"no checkpoint in {folder} can be used: {'; '.join(damaged) or 'they were removed'}. To start over, choose "
        "another folder or delete this one"
    )


def checkpoint_of(folder: str | Path, step: int) -> Checkpoint:
    """Loads the checkpoint of a step; if there are several, the most recent.

    Raises:
        DamagedCheckpoint: if a checksum does not match.
        CheckpointError: if that step has no checkpoint.
    """
    for path, manifest in _readable_checkpoints(Path(folder)):
        if manifest["step"] == step:
            return read_checkpoint(path)
    raise CheckpointError(f"there is no checkpoint of step {step} in {folder}")


def best_name(folder: str | Path) -> str | None:
    """Name of the checkpoint with the highest metric, without loading it; None if none has a metric."""
    checkpoints = _readable_checkpoints(Path(folder))
    best = _select_kept(checkpoints, checkpoints[0][1]["step"], 1)[1] if checkpoints else None
    return best.name if best else None


def best_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Loads the checkpoint with the highest metric; None if none has a metric.

    Raises:
        DamagedCheckpoint: if a checksum does not match.
    """
    name = best_name(folder)
    return None if name is None else read_checkpoint(Path(folder) / name)


def read_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Reads and verifies one checkpoint.

    Args:
        path: its folder.
        verify: True reads every byte and compares checksums; False compares file sizes only.

    Raises:
        DamagedCheckpoint: naming the file that is missing or changed.
        CheckpointError: if its format is newer than this version reads.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not _FILE_NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise DamagedCheckpoint(f"{file} has {size} bytes instead of {expected['bytes']}")
        if verify and files.sha256_of(file) != expected["sha256"]:
            raise DamagedCheckpoint(f"{file} has changed since it was written: its SHA-256 does not match")
    return Checkpoint(
        path=path,
        step=manifest["step"],
        serial=manifest["serial"],
        metric=manifest["metric"],
        versions=manifest["versions"],
        files=manifest["files"],
        state=json.loads((path / STATE).read_bytes()),
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        if file.is_symlink():
            raise FileNotFoundError
        manifest = json.loads(file.read_bytes())
        digest = manifest.pop("sha256")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{file} is missing") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{file} cannot be read") from error
    if digest != _digest(manifest):
        raise DamagedCheckpoint(f"{file} has changed since it was written: its SHA-256 does not match")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, written by trl {manifest['versions'].get('trl')}; "
            f"this version reads formats up to {FORMAT}"
        )
    return manifest


def _manifest_or_error(path: Path) -> dict[str, Any] | DamagedCheckpoint:
    try:
        return _read_manifest(path)
    except DamagedCheckpoint as error:
        return error


def _folders(folder: Path) -> list[Path]:
    """Folders (not symlinks) named like a checkpoint."""
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if _FOLDER_NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def _readable_checkpoints(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints with a readable manifest, newest first."""
    manifests = [(path, _manifest_or_error(path)) for path in _folders(folder)]
    readable = [(path, manifest) for path, manifest in manifests if isinstance(manifest, dict)]
    return sorted(readable, key=lambda entry: -entry[1]["serial"])


def _compare_with_pointer(folder: Path, folders: list[Path]) -> None:
    """Warns if latest.json is unreadable or names a checkpoint that no longer exists."""
    try:
        named = str(json.loads((folder / POINTER).read_bytes())["checkpoint"])
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        logger.warning("%s cannot be read; searching the checkpoints beside it", folder / POINTER)
        return
    if named not in [path.name for path in folders]:
        logger.warning("%s names %s, which no longer exists", folder / POINTER, named)
