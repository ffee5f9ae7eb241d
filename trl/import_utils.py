"""Availability of optional dependencies, and names that differ between their releases.

The functions of TRL 0.4 to 0.11 are all here, whether this library uses the package or not: scripts branch on them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from trl import legacy

if not TYPE_CHECKING:  # type checkers go on refusing unknown names
    __getattr__ = legacy.lookup(__name__)


def _installed(package: str) -> Callable[[], bool]:
    """Returns a function that says whether `package` can be imported."""

    def is_available() -> bool:
        return importlib.util.find_spec(package) is not None

    is_available.__doc__ = (
        f"Whether `{package}` can be imported; checked at every call, so that hiding it takes effect at once."
    )
    return is_available


is_bitsandbytes_available = _installed("bitsandbytes")
is_diffusers_available = _installed("diffusers")
is_liger_kernel_available = _installed("liger_kernel")
is_liger_available = is_liger_kernel_available
is_llmblender_available = _installed("llm_blender")
is_openai_available = _installed("openai")
is_peft_available = _installed("peft")
is_pil_available = _installed("PIL")
is_rich_available = _installed("rich")
is_sklearn_available = _installed("sklearn")
is_torchvision_available = _installed("torchvision")
is_unsloth_available = _installed("unsloth")
is_wandb_available = _installed("wandb")


def is_npu_available() -> bool:
    """Whether torch can use an Ascend NPU."""
    from accelerate.utils import is_npu_available as usable

    return usable()


def is_xpu_available() -> bool:
    """Whether torch can use an Intel GPU."""
    from accelerate.utils import is_xpu_available as usable

    return usable()


def is_transformers_greater_than(current_version: str = "", version: str = "") -> bool:
    """Whether the installed transformers is newer than `current_version` (`version` in TRL 0.7), such as "4.40.0"."""
    from accelerate.utils import compare_versions

    return compare_versions("transformers", ">", current_version or version)


def is_accelerate_greater_20_0() -> bool:
    """Whether accelerate 0.20 or newer is installed."""
    return True  # this library requires a newer one


def is_torch_greater_2_0() -> bool:
    """Whether torch 2.0 or newer is installed."""
    return int(importlib.metadata.version("torch").split(".")[0]) >= 2


def cache_keyword(parameters: Container[str]) -> str:
    """Returns the name of a forward's cache argument: `cache` in transformers >= 5.24, else `past_key_values`.

    Args:
        parameters: names of the forward's parameters.
    """
    return "cache" if "cache" in parameters and "past_key_values" not in parameters else "past_key_values"
