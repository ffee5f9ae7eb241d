"""Cache of the log-probabilities and values computed during sampling, so that `step` need not recompute them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

# Maximum number of cached responses; the oldest are evicted first.
_MOST = 2**14

# Checksum parameters: chunk size in 8-byte words, and an odd multiplier with well-mixed bits (2 ** 64 / golden ratio).
_AT_ONCE = 2**18
_FACTOR = -7046029254386353131

State = tuple[float | str, ...]


class Recall:
    """Cache of log-probabilities and values of sampled responses, valid for a single model state."""

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._state: State = ()

    def keep(
        self,
        state: State,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        logprobs: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> None:
        """Caches per-token log-probabilities and values of responses, clearing the cache if the state changed."""
        if state != self._state:
            self.forget()
            self._state = state
        for query, response, *numbers in zip(queries, responses, logprobs, values, strict=True):
            self._found[_key(query, response)] = (numbers[0], numbers[1])
        for key in list(self._found)[: max(0, len(self._found) - _MOST)]:
            del self._found[key]

    def find(
        self, state: State, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Cached log-probabilities and values of these responses; None if any is missing or the state has changed."""
        if state != self._state:
            return None
        found = [self._found.get(_key(q, r)) for q, r in zip(queries, responses, strict=True)]
        known = [numbers for numbers in found if numbers is not None]
        return ([n[0] for n in known], [n[1] for n in known]) if len(known) == len(found) else None

    def forget(self) -> None:
        """Clears the cache; called before an update changes the weights."""
        self._found.clear()


def state_of(model: nn.Module) -> str:
    """Digest of everything that an evaluation-mode forward pass depends on besides its inputs.

    Reads all weights and buffers, because version counters miss writes through `.data`, by fused optimizers or by
    third-party kernels. Attributes of modules and their configurations are included by value if they are numbers, text,
    tensors or containers of these; other objects, such as hooks, by identity.
    """
    sums: list[Tensor] = []
    seen: set[int] = set()

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            if hasattr(type(value), "__tensor_flatten__"):  # quantised or sharded: made of several tensors
                return [described(getattr(value, name)) for name in value.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
            if value.device.type != "meta":
                sums.append(_checksum(value))
            return str(value.dtype), tuple(value.shape)
        if value is None or isinstance(
            value, bool | int | float | complex | str | bytes | Enum | torch.dtype | torch.device
        ):
            return repr(value)
        holds = vars(value) if callable(getattr(value, "to_dict", None)) else value  # a configuration
        if isinstance(holds, Mapping | list | tuple | set | frozenset):
            if id(value) in seen:
                return "again"
            seen.add(id(value))
            keys = list(map(repr, holds)) if isinstance(holds, Mapping) else []
            parts = holds.values() if isinstance(holds, Mapping) else holds
            return type(value).__name__, keys, [described(part) for part in parts]
        return type(value).__name__, id(value)

    text = [
        (name, attribute, described(value))
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in ("training", "_modules")
    ]
    return blake2b(repr((text, [int(one) for one in sums])).encode(), digest_size=24).hexdigest()


def _checksum(tensor: Tensor) -> Tensor:
    """Scalar int64 checksum of a tensor's bits, on its device; sensitive to every element and to their order."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    bits = flat.view(torch.uint8)
    whole = len(bits) - len(bits) % 8
    factors = torch.arange(1, min(_AT_ONCE, len(bits)) + 1, device=bits.device).mul_(_FACTOR)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in (*bits[:whole].view(torch.int64).split(_AT_ONCE), bits[whole:].long()):
        # Fold high bits into low ones first: products modulo 2 ** 64 would lose them, such as a pair of sign bits.
        mixed = (part >> 32).bitwise_xor_(part).mul_(factors[: len(part)])
        total = total * 31 + mixed.sum()
    return total


def _key(query: Tensor, response: Tensor) -> bytes:
    found = blake2b(digest_size=24)
    for tokens in (query, response):
        words = tokens.detach().cpu().long().contiguous()
        found.update(len(words).to_bytes(8, "little") + words.numpy().tobytes())
    return found.digest()
