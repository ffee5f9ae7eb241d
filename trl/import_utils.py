"""What is installed beside this library, and what its releases call things."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Container


def is_peft_available() -> bool:
    """Whether `peft` can be imported now. Looked up at every call, so that hiding it takes effect at once."""
    return importlib.util.find_spec("peft") is not None


def is_torch_greater_2_0() -> bool:
    """Whether torch 2.0 or newer is installed."""
    return int(importlib.metadata.version("torch").split(".")[0]) >= 2


def cache_keyword(parameters: Container[str]) -> str:
    """The argument of a forward that takes the key-value cache: `cache` from transformers 5.24 on.

    Args:
        parameters: what the forward takes, by name.
    """
    return "cache" if "cache" in parameters and "past_key_values" not in parameters else "past_key_values"
