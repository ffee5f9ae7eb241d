"""Peak memory of a run."""

from __future__ import annotations

import sys

import torch


def memory_statistics(device: torch.device) -> dict[str, float]:
    """`memory/peak_mb`: this process's peak memory so far, in MiB.

    On CUDA, memory allocated by torch; elsewhere, resident memory. Empty on Windows, where it is not available.
    """
    if device.type == "cuda":
        return {"memory/peak_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    if sys.platform == "win32":
        return {}
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return {"memory/peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
