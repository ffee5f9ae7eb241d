"""What sampling computed about the tokens that it drew, kept for the step that learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor, nn

# Responses that are remembered; the oldest are forgotten first.
_MOST = 2**14

State = tuple[float, ...]


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


def state_of(model: nn.Module) -> State:
    """Changes when somebody else changes the weights, as far as that can be told without reading all of them.

    torch counts what is written to a tensor, but neither what fused optimizers write nor what is written through `.data`:
    hence a number from the middle of each trained weight, too.
    """
    parameters = list(model.parameters())
    numbers = [
        float(parameter.detach().flatten()[parameter.numel() // 2])
        for parameter in parameters
        if parameter.requires_grad
        and type(parameter) is nn.Parameter
        and parameter.numel()
        and parameter.device.type != "meta"
    ]
    return (*(float(parameter._version) for parameter in parameters), *numbers)


def _key(query: Tensor, response: Tensor) -> bytes:
    found = blake2b(digest_size=24)
    for tokens in (query, response):
        words = tokens.detach().cpu().long().contiguous()
        found.update(len(words).to_bytes(8, "little") + words.numpy().tobytes())
    return found.digest()
