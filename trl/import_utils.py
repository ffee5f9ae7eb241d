"""Availability of optional dependencies, and names that differ between their releases."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Container


def is_peft_available() -> bool:
    """Whether `peft` can be imported; checked at every call, so that hiding the package takes effect at once."""
    return importlib.util.find_spec("peft") is not None


def is_torch_greater_2_0() -> bool:
    """Whether torch 2.0 or newer is installed."""
    return int(importlib.metadata.version("torch").split(".")[0]) >= 2


def cache_keyword(parameters: Container[str]) -> str:
    """Returns the name of a forward's cache argument: `cache` in transformers >= 5.24, else `past_key_values`.

    Args:
        parameters: names of the forward's parameters.
    """
    return "cache" if "cache" in parameters and "past_key_values" not in parameters else "past_key_values"
