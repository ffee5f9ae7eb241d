"""Software versions and hardware of a run, without environment variables, user names or host names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("trl", "torch", "transformers", "accelerate", "peft", "numpy", "safetensors", "tokenizers", "datasets")


def environment() -> dict[str, Any]:
    """Package versions (None if not installed), git commit of the working directory, and hardware."""
    from trl import __version__

    packages = {name: _version(name) for name in _PACKAGES} | {"trl": __version__}
    return {"python": platform.python_version(), "packages": packages, "git": _git(), "machine": _machine()}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Lists the changes between two environments, such as "packages.torch: 2.12 -> 2.13"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line for key in keys for line in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if before == now else [f"{name}: {before} -> {now}"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Git commit and whether tracked files have changed; None outside a checkout or without git."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if status is None else bool(status)}


def _output(*command: str) -> str | None:
    try:
        completed = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.decode("utf-8", "replace").strip()


def _machine() -> dict[str, Any]:
    import torch

    # Query GPUs only if CUDA is already initialised: the query would initialise it, which makes forking unsafe.
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if on_cuda else [],
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
