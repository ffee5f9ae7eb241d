"""How much memory a run has needed."""

from __future__ import annotations

import sys

import torch


def memory_statistics(device: torch.device) -> dict[str, float]:
    """`memory/peak_mb`: the most memory that this process has held so far, in MiB.

    On a CUDA device what torch has allocated there, elsewhere resident memory. Empty on Windows, which does not tell.
    """
    if device.type == "cuda":
        return {"memory/peak_mb": torch.cuda.max_memory_allocated(device) / 2**20}
    if sys.platform == "win32":
        return {}
    import resource  # of Unix

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"memory/peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
