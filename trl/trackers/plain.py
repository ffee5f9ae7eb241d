"""Conversion of arbitrary values to plain data for YAML and JSON, with secrets redacted."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from trl.redaction import redact

_MAX_ELEMENTS = 64  # maximum number of elements of an array that is written out


def plain(value: Any) -> Any:
    """Converts a value to dicts with string keys, lists, strings, numbers, booleans and None, with secrets redacted.

    Dataclasses become dicts of their fields, sets sorted lists, functions and classes `module:name`, and small arrays
    lists. Anything else becomes its type name, never a memory address, so equal settings give equal text.
    """
    return redact(_plain(value))


def as_number(value: Any) -> int | float | None:
    """Converts a number of any type, or an array or tensor with a single element, to a Python number; else None."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    shape, item = getattr(value, "shape", None), getattr(value, "item", None)
    if callable(item) and isinstance(shape, tuple) and math.prod(shape) == 1:
        return as_number(item())
    return None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialises a value as ASCII-only JSON; non-finite numbers become null.

    ASCII-only because some JSON Lines readers treat U+2028 and similar characters as line ends.
    """
    return json.dumps(_finite(plain(value)), indent=indent, allow_nan=False)


def clean_text(text: str) -> str:
    """Makes a text valid UTF-8 by escaping lone surrogates, which faulty decoders leave behind."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):  # before str: an enum of texts is its text, too
        return _plain(value.value)
    if isinstance(value, str):
        return clean_text(str(value))
    if isinstance(value, numbers.Integral | numbers.Real):
        return as_number(value)
    if isinstance(value, PurePath):
        return clean_text(str(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {clean_text(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if hasattr(value, "tolist") and math.prod(getattr(value, "shape", ())) <= _MAX_ELEMENTS:
        return _plain(value.tolist())
    return _type_name(value)


def _type_name(value: Any) -> str:
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}:{value.__qualname__}"
    kind = type(value)
    if kind.__module__ == "torch" and not hasattr(value, "shape"):
        return str(value)  # a dtype or a device
    shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
    return f"<{kind.__module__}:{kind.__qualname__}{shape}>"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
