"""The input batch of one `step` call: queries and responses, raw and padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Queries and responses as given, and `inputs`, the same padded for the model."""

    queries: list[Tensor]
    responses: list[Tensor]
    inputs: Mapping[str, Tensor]

    def rows(self, rows: Tensor) -> Batch:
        """Selects the samples at indices `rows` `[b]`, keeping their padding."""
        some = rows.tolist()
        return Batch(
            [self.queries[i] for i in some],
            [self.responses[i] for i in some],
            {name: tensor[rows.to(tensor.device)] for name, tensor in self.inputs.items()},
        )
