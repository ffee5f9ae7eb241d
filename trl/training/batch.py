"""Queries and responses of one call of `step`, as they came and as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Queries and responses as they came, and padded as the model takes them."""

    queries: list[Tensor]
    responses: list[Tensor]
    inputs: Mapping[str, Tensor]

    def rows(self, rows: Tensor) -> Batch:
        """The samples with the indices `rows` [b], padded as they are."""
        some = rows.tolist()
        return Batch(
            [self.queries[i] for i in some],
            [self.responses[i] for i in some],
            {name: tensor[rows.to(tensor.device)] for name, tensor in self.inputs.items()},
        )
