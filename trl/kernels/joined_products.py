"""Linear layers, with their LoRA adapters, merged into one product on oneDNN-packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.kernels.products import LinearForward, can_be_packed, packed, packed_linear

LowRank = tuple[Tensor, Tensor]  # LoRA matrices: A `[r, in]`, and B `[out, r]` times the scaling
Part = tuple[Any, LowRank | None]  # a plain linear layer and its adapter
_AFTER = {
    "none": lambda x: x,
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


def is_free(layer: Any) -> bool:
    """Whether the layer has no forward hooks and no replaced `forward` other than `LinearForward`."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and isinstance(vars(layer).get("forward"), LinearForward | None)


def is_plain(layer: Any) -> bool:
    """Whether a layer is an unmodified `nn.Linear` or transformers `Conv1D`."""
    return type(layer) in (nn.Linear, Conv1D) and type(layer.weight) is nn.Parameter and is_free(layer)


def adapter_of(module: Any) -> LowRank | None:
    """Returns the matrices of a plain, active LoRA layer; None for any other module."""
    if type(module).__name__ != "Linear" or not type(module).__module__.startswith("peft.tuners.lora."):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or len(names) != 1 or not is_free(module):
        return None
    (name,) = names
    low, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    layers = (module.base_layer, low, up)
    if not all(type(layer) is nn.Linear and is_plain(layer) for layer in layers):
        return None
    if (
        low.bias is not None
        or up.bias is not None
        or name in module.lora_variant
        or (dropout.training and getattr(dropout, "p", 0))
    ):
        return None
    if len({layer.weight.dtype for layer in layers}) > 1:
        return None
    return low.weight.detach(), up.weight.detach() * module.scaling[name]


def part_of(layer: Any) -> Part | None:
    """Returns a linear layer and its adapter; None unless both are plain."""
    if is_plain(layer):
        return layer, None
    adapter = adapter_of(layer)
    return None if adapter is None else (layer.base_layer, adapter)


class Joined:
    """Linear layers with a shared input, as one product: `[..., in]`, at least one row, to concatenated `[..., out]`.

    Args:
        parts: plain layers, each with its adapter's matrices or None.
        rows: approximate number of rows per product.
    """

    def __init__(self, parts: Sequence[Part], rows: int) -> None:
        weights = [_weight(layer) for layer, _ in parts]
        lows = [adapter[0] for _, adapter in parts if adapter is not None]
        self.weight = packed(_one([*weights, *lows]), rows)
        self.dtype = weights[0].dtype
        self.bias: Tensor | None = None
        if any(layer.bias is not None for layer, _ in parts):
            biases = [_bias(layer, weight) for (layer, _), weight in zip(parts, weights, strict=True)]
            self.bias = _one([*biases, *(low.new_zeros(len(low)) for low in lows)])
        self.sizes = [len(weight) for weight in weights]
        self.size = sum(self.sizes)
        self.ups: list[tuple[slice, slice, Tensor]] = []  # output columns, columns of x A^T, and B^T `[r, out]`
        start, read = 0, self.size
        for size, (_, adapter) in zip(self.sizes, parts, strict=True):
            if adapter is not None:
                rank = len(adapter[0])
                self.ups.append((slice(start, start + size), slice(read, read + rank), adapter[1].t()))
                read += rank
            start += size

    def __call__(
        self, rows: Tensor, *, activation: str = "none", added: Tensor | None = None, times: Tensor | None = None
    ) -> Tensor:
        """Multiplies `rows`; arguments as for `packed_linear`."""
        if not self.ups:
            return packed_linear(rows, self.weight, self.bias, activation=activation, added=added, times=times)
        both = packed_linear(rows, self.weight, self.bias).flatten(0, -2)
        if len(self.sizes) == 1:
            found = torch.addmm(both[:, : self.size], both[:, self.size :], self.ups[0][2])
        else:
            for result, read, up in self.ups:
                both[:, result] = torch.addmm(both[:, result], both[:, read], up)
            found = both[:, : self.size]
        found = found.view(*rows.shape[:-1], self.size)
        if added is not None:
            return found + added
        if times is not None:
            return found * times
        return _AFTER[activation](found)


def can_be_joined(parts: Sequence[Part]) -> bool:
    """Whether `Joined` supports these layers: same dtype, device and input width, and together large enough to pack."""
    weights = [_weight(layer) for layer, _ in parts]
    weights += [adapter[0] for _, adapter in parts if adapter is not None]
    same = len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) == 1
    return same and can_be_packed(weights[0][:1].expand(sum(map(len, weights)), -1))


def _one(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _weight(layer: Any) -> Tensor:
    """Returns the weight as `[out, in]`."""
    weight: Tensor = layer.weight.detach()
    return weight.t() if type(layer) is Conv1D else weight


def _bias(layer: Any, weight: Tensor) -> Tensor:
    return weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
