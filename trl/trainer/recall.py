"""What sampling computed about the tokens that it drew, kept for the step that learns from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Responses that are remembered; the oldest are forgotten first.
_MOST = 2**16

Key = tuple[tuple[int, ...], tuple[int, ...]]


class Recall:
    """Log-probabilities and values of sampled responses, as long as the weights that they are of do not change."""

    def __init__(self) -> None:
        self._found: dict[Key, tuple[Tensor, Tensor]] = {}
        self._state: tuple[float, ...] = ()

    def keep(
        self,
        model: nn.Module,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        logprobs: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> None:
        """Remembers a number of each kind for every token of every response."""
        self._forget_if_changed(model)
        for query, response, *numbers in zip(queries, responses, logprobs, values, strict=True):
            self._found[_key(query, response)] = (numbers[0], numbers[1])
        for key in list(self._found)[: max(0, len(self._found) - _MOST)]:
            del self._found[key]

    def find(
        self, model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Log-probabilities and values of all of these responses; None if one of them is not remembered."""
        self._forget_if_changed(model)
        found = [self._found.get(_key(q, r)) for q, r in zip(queries, responses, strict=True)]
        known = [numbers for numbers in found if numbers is not None]
        return ([n[0] for n in known], [n[1] for n in known]) if len(known) == len(found) else None

    def _forget_if_changed(self, model: nn.Module) -> None:
        state = _state(model)
        if state != self._state:
            self._found.clear()
            self._state = state


def _state(model: nn.Module) -> tuple[float, ...]:
    """Changes when the weights do.

    torch counts what is written to a tensor, but neither what fused optimizers write nor what is written through `.data`:
    hence a number from the middle of each trained weight, too.
    """
    parameters = list(model.parameters())
    numbers = [
        parameter.detach().flatten()[parameter.numel() // 2].float()
        for parameter in parameters
        if parameter.requires_grad and type(parameter) is nn.Parameter and parameter.numel()
    ]
    return (*(parameter._version for parameter in parameters), *(torch.stack(numbers).tolist() if numbers else ()))


def _key(query: Tensor, response: Tensor) -> Key:
    return tuple(query.tolist()), tuple(response.tolist())
