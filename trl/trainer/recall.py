"""What sampling computed about the tokens that it drew, kept for the step that learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

# Responses that are remembered; the oldest are forgotten first.
_MOST = 2**14

# Of a checksum: numbers of 8 bytes that are looked at together, and an odd factor without a pattern (2 ** 64 over the golden
# ratio).
_AT_ONCE = 2**18
_FACTOR = -7046029254386353131

State = tuple[float | str, ...]


class Recall:
    """Log-probabilities and values of sampled responses, as long as what they are a function of stays as it is."""

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
        """Remembers a number of each kind for every token of every response, and forgets those of another state."""
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
        """Log-probabilities and values of all of these responses in this state; None if one of them is not remembered."""
        if state != self._state:
            return None
        found = [self._found.get(_key(q, r)) for q, r in zip(queries, responses, strict=True)]
        known = [numbers for numbers in found if numbers is not None]
        return ([n[0] for n in known], [n[1] for n in known]) if len(known) == len(found) else None

    def forget(self) -> None:
        """Of the weights that an update is about to change."""
        self._found.clear()


def state_of(model: nn.Module) -> str:
    """A digest of what a forward pass in evaluation mode is a function of, besides its inputs.

    All of the weights and buffers are read: no count of changes sees what is written through `.data`, by fused optimizers or
    by other code's kernels. Attributes of modules and of their configurations count where they are numbers, text, tensors or
    containers of them; other objects, such as hooks, by their identity.
    """
    sums: list[Tensor] = []
    seen: set[int] = set()

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            if hasattr(type(value), "__tensor_flatten__"):  # quantised or sharded: of several tensors
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
    """`[]` int64 of a tensor's bits, on its device: changes with any number, and where numbers change places."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.data_ptr() % 8:
        flat = flat.clone()
    bits = flat.view(torch.uint8)
    whole = len(bits) - len(bits) % 8
    factors = torch.arange(1, min(_AT_ONCE, len(bits)) + 1, device=bits.device).mul_(_FACTOR)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in (*bits[:whole].view(torch.int64).split(_AT_ONCE), bits[whole:].long()):
        # Products are known modulo 2 ** 64, which would lose the highest bits, two signs for example: they go into low ones first.
        mixed = (part >> 32).bitwise_xor_(part).mul_(factors[: len(part)])
        total = total * 31 + mixed.sum()
    return total


def _key(query: Tensor, response: Tensor) -> bytes:
    found = blake2b(digest_size=24)
    for tokens in (query, response):
        words = tokens.detach().cpu().long().contiguous()
        found.update(len(words).to_bytes(8, "little") + words.numpy().tobytes())
    return found.digest()
