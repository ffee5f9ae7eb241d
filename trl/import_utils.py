"""What is installed beside this library."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def is_peft_available() -> bool:
    """Whether `peft` can be imported now. Looked up at every call, so that hiding it takes effect at once."""
    return importlib.util.find_spec("peft") is not None


def is_torch_greater_2_0() -> bool:
    """Whether torch 2.0 or newer is installed."""
    return int(importlib.metadata.version("torch").split(".")[0]) >= 2
