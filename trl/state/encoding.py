"""Python state encoded as JSON, with tensors kept separately, so that decoding never executes code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

_TAGS = ("__tensor__", "__tuple__", "__float__", "__items__", "__counter__")


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Encodes `value` as JSON losslessly, moving its tensors to `tensors`.

    Args:
        value: None, booleans, numbers, strings, tensors, and lists, tuples and dicts of them.
        path: path of the value, such as "scheduler"; names its tensors and appears in errors.
        tensors: receives the tensors, by path.

    Raises:
        ValueError: if a value has another type, naming its path.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), path, tensors)
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, tuple | list):
        items = [encode(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"__tuple__": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        pairs = [[encode(k, path, tensors), encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        if isinstance(value, Counter):
            return {"__counter__": pairs}
        if all(isinstance(key, str) and key not in _TAGS for key in value):
            return dict(pairs)
        return {"__items__": pairs}
    raise ValueError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot store; it stores numbers, strings, tensors, "
        "and lists, tuples and dicts of them"
    )


def decode(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Inverse of `encode`; `tensor` looks up a tensor by its path."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), *_ = value.items()
        if tag == "__tensor__":
            return tensor(inner)
        if tag == "__float__":
            return float(inner)
        if tag == "__tuple__":
            return tuple(decode(item, tensor) for item in inner)
        if tag in ("__items__", "__counter__"):
            pairs = {decode(k, tensor): decode(v, tensor) for k, v in inner}
            return pairs if tag == "__items__" else Counter(pairs)
    return {key: decode(item, tensor) for key, item in value.items()}


def no_tensors(path: str) -> Tensor:
    """Tensor lookup for `decode` where no tensor is allowed: always raises ValueError."""
    raise ValueError(f"found a tensor at {path}, where only numbers are allowed")
