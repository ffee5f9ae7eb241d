"""Linear layers that decode on weights in oneDNN's own layout, packed once per batch of responses.

Replaces the `forward` of linear and plain LoRA layers while responses are sampled on a CPU. A product with few rows is
bound by reading the weights, and torch's own layout reads more slowly. Gain on two cores of a Zen 5 EPYC, at 16 rows:
1.3 times the products per second in bfloat16, 1.8 to 2.8 times in float32 (`python bench/products.py`). It costs one
copy of the weights while sampling. Off with `TRL_KERNELS=off`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.door import kernels_enabled, replaced_forwards
from trl.kernels.products import LinearForward, can_be_packed, packed, packed_linear, prefers_onednn

logger = logging.getLogger(__name__)

# Minimum number of tokens at which copying the weights pays off.
LEAST_TOKENS = 12
# Share of the machine's memory that the copies may take. Of total, not free memory, so that a resumed run makes the
# same choice.
_SHARE = 1 / 8

LowRank = tuple[Tensor, Tensor]  # LoRA matrices: A `[r, in]`, and B `[out, r]` times the scaling
Part = tuple[Any, LowRank | None]  # a plain linear layer and its adapter


class _PackedLinear:
    """Replacement for the `forward` of a linear or LoRA layer; an adapter's A is packed together with the weight."""

    def __init__(self, part: Part, plain: Callable[..., Tensor], rows: int) -> None:
        layer, adapter = part
        weight = _weight(layer)
        self.plain = plain
        self.dtype, self.size = weight.dtype, len(weight)
        self.bias: Tensor | None = None if layer.bias is None else layer.bias.detach()
        self.up: Tensor | None = None  # B^T `[r, out]`, times the scaling
        if adapter is not None:
            low, up = adapter
            weight, self.up = torch.cat([weight, low]), up.t()
            if self.bias is not None:
                self.bias = torch.cat([self.bias, low.new_zeros(len(low))])
        self.weight = packed(weight, rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or args[0].dtype != self.dtype or not args[0].numel():
            return self.plain(*args, **kwargs)
        output = packed_linear(args[0], self.weight, self.bias)
        if self.up is None:
            return output
        both = output.flatten(0, -2)  # [rows, out + r]
        adapted = torch.addmm(both[:, : self.size], both[:, self.size :], self.up)
        return adapted.view(*output.shape[:-1], self.size)


def _is_unhooked(layer: Any) -> bool:
    """Whether the layer has no forward hooks and no replaced `forward` other than `LinearForward`."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and isinstance(vars(layer).get("forward"), LinearForward | None)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is an unmodified `nn.Linear` or transformers `Conv1D`."""
    return type(layer) in (nn.Linear, Conv1D) and type(layer.weight) is nn.Parameter and _is_unhooked(layer)


def _adapter_of(module: Any) -> LowRank | None:
    """Returns the matrices of a plain, active LoRA layer; None for any other module."""
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora."):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(names) != 1 or not _is_unhooked(module):
        return None
    (name,) = names
    low, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    layers = (module.base_layer, low, up)
    if not all(type(layer) is nn.Linear and _is_plain(layer) for layer in layers):
        return None
    if (
        low.bias is not None
        or up.bias is not None
        or name in module.lora_variant
        or (dropout.training and getattr(dropout, "p", 0))
    ):
        return None
    if len({(layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
        return None
    return low.weight.detach(), up.weight.detach() * module.scaling[name]


def _part_of(layer: Any) -> Part | None:
    """Returns a linear layer and its adapter; None unless both are plain and together large enough to pack."""
    adapter = _adapter_of(layer)
    base = layer if adapter is None else layer.base_layer
    if not _is_plain(base):
        return None
    weight = _weight(base)
    size = len(weight) + (0 if adapter is None else len(adapter[0]))
    return (base, adapter) if can_be_packed(weight[:1].expand(size, -1)) else None


def _weight(layer: Any) -> Tensor:
    """Returns the weight as `[out, in]`."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if type(layer) is Conv1D else weight


@cache
def _memory() -> int | None:
    """Returns this process's share of memory in bytes: the machine's or cgroup's, over local ranks; None if unknown."""
    try:
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, OSError, ValueError):
        return None
    for path in _limit_files():
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1))


def _limit_files() -> Iterator[Path]:
    """Yields files that may hold a memory limit of this process's cgroups, v2 or v1."""
    root, cgroup_file = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    for line in cgroup_file.read_text().splitlines() if cgroup_file.is_file() else ():
        number, names, path = line.split(":", 2)
        folder = Path(path.lstrip("/"))
        if number == "0":
            yield from (root / ancestor / "memory.max" for ancestor in (folder, *folder.parents))
        elif "memory" in names.split(","):
            yield from (root / "memory" / ancestor / "memory.limit_in_bytes" for ancestor in (folder, *folder.parents))


@cache
def _log_too_large(copy_bytes: int, memory: int | None) -> None:
    limit = f"more than an eighth of the memory ({memory / 1e9:.1f} GB)" if memory else "and the memory size is unknown"
    logger.info("weights are not packed for decoding: the copies take %.1f GB, %s", copy_bytes / 1e9, limit)


@contextmanager
def packed_weights(model: nn.Module, *, rows: int, tokens: int) -> Iterator[None]:
    """Makes the layers of `model` use packed copies of their weights inside the `with` block; not differentiable.

    Does nothing if torch lacks support, for too few tokens, or if the copies would exceed an eighth of the memory.

    Args:
        model: a plain transformers language model, or one with adapters; its weights must not change inside the block.
        rows: approximate number of rows decoded at a time.
        tokens: approximate number of forward passes.
    """
    parts: dict[Any, Part] = {}
    # MKL multiplies a single float32 row 1.2 to 1.8 times as fast as oneDNN does; with 4 rows or more it is slower.
    mkl_is_faster = rows == 1 and next(model.parameters()).dtype == torch.float32 and not prefers_onednn()
    # Autocast would cast the weights in every pass.
    if kernels_enabled() and not mkl_is_faster and tokens >= LEAST_TOKENS and not torch.is_autocast_enabled("cpu"):
        parts = _parts(model)
    copy_bytes = sum(
        part.weight.numel() * part.weight.element_size()
        for module in parts
        for part in module.modules()
        if type(part) in (nn.Linear, Conv1D)
    )
    memory = _memory()
    if parts and (memory is None or copy_bytes > _SHARE * memory):
        _log_too_large(copy_bytes, memory)
        parts = {}
    with replaced_forwards({module: _PackedLinear(part, module.forward, rows) for module, part in parts.items()}):
        yield


def _parts(model: nn.Module) -> dict[Any, Part]:
    """Returns the layers to pack by the module whose `forward` they compute."""
    parts: dict[Any, Part] = {}
    covered: set[nn.Module] = set()
    for module in model.modules():  # parents come before their children
        if module in covered:
            continue
        if (part := _part_of(module)) is not None:
            parts[module] = part
        elif type(module).__name__ != "ParamWrapper":  # peft's ParamWrapper changes the weight under it in every pass
            continue
        covered |= set(module.modules())
    return parts
