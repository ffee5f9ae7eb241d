"""The only way into this package: its off switch, and how fast code replaces a model's own.

`TRL_KERNELS=off` in the environment runs the library on plain torch and transformers code. Results then differ by
rounding, and dropout draws different masks, because rows are padded instead of packed. Settings keep their meaning:
`PPOConfig.dtype`, `optimizer_state_dtype` and `gradient_checkpointing` are not kernels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

SWITCH = "TRL_KERNELS"


@cache
def kernels_enabled() -> bool:
    """Whether the code in `trl.kernels` may replace plain code; reads the environment once per process.

    Raises:
        ValueError: if `TRL_KERNELS` is neither "on", "off" nor empty.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "on", "off"):
        raise ValueError(f"{SWITCH}={value!r} in the environment must be 'on', 'off' or empty")
    if value == "off":
        logger.info("%s=off: running plain torch and transformers code", SWITCH)
    return value != "off"


def replace_forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Callable[[], None]:
    """Sets the `forward` of module instances, which leaves parameter names and state dict keys as they are.

    Args:
        forwards: new `forward` of each module.

    Returns:
        A function that restores the modules' previous `forward`.
    """
    before = {module: vars(module).get("forward") for module in forwards}  # None: the class's own
    for module, forward in forwards.items():
        module.forward = forward

    def restore() -> None:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward

    return restore


@contextmanager
def replaced_forwards(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """`replace_forwards` inside the `with` block."""
    restore = replace_forwards(forwards)
    try:
        yield
    finally:
        restore()


@contextmanager
def chosen_attention(config: Any, name: str) -> Iterator[None]:
    """Selects the attention function `name` for models that use `config` inside the `with` block.

    Args:
        config: the configuration that the attention layers read.
        name: a name in transformers' `AttentionInterface`.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
