"""SHA-256 fingerprints of weights that a run depends on but its checkpoints do not store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor, nn

from trl.state.tensorfile import tensor_bytes


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a model by name; tied ones appear once, under their first name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name not in transient}


class Fingerprints:
    """Cached SHA-256 digests of weights, recomputed only when a tensor's storage or torch version counter changes."""

    def __init__(self) -> None:
        self._cache: dict[tuple[str, str], tuple[int, int, str]] = {}

    def of(self, role: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Digests of dtype, shape and bytes, by name; `role` distinguishes models with the same parameter names."""
        return {name: self._digest((role, name), tensor) for name, tensor in tensors.items()}

    def _digest(self, key: tuple[str, str], tensor: Tensor) -> str:
        cached = self._cache.get(key)
        if cached is not None and cached[:2] == (tensor.data_ptr(), tensor._version):
            return cached[2]
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
        self._cache[key] = (tensor.data_ptr(), tensor._version, digest.hexdigest())
        return digest.hexdigest()
