"""Streaming writer for the safetensors format, which avoids a second copy of the tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def kind_of(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """Safetensors dtype name and shape of a tensor.

    Raises:
        ValueError: if safetensors does not support the dtype.
    """
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"safetensors cannot store {tensor.dtype}; it stores {', '.join(map(str, _DTYPE_NAMES))}")
    return _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Raw bytes of a tensor in row-major order; no copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def safetensors_size(tensors: Mapping[str, Tensor]) -> int:
    """Size in bytes of the safetensors file that holds `tensors`."""
    return len(_header(tensors)) + sum(t.numel() * t.element_size() for t in tensors.values())


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a safetensors file: the header, then one tensor at a time.

    Raises:
        ValueError: if safetensors does not support a tensor's dtype.
    """
    yield _header(tensors)
    for name in _file_order(tensors):
        yield tensor_bytes(tensors[name])


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensor names in file order: widest dtypes first, so that every tensor is aligned to its element size."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _file_order(tensors):
        dtype, shape = kind_of(tensors[name])
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
