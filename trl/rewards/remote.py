"""Scores from a service over HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl.rewards.failures import ColumnError
from trl.rewards.isolation import in_threads
from trl.rewards.web import Endpoint, Refused, post_json

if TYPE_CHECKING:
    from trl.types import Sample


class RemoteReward:
    """Asks a service for scores.

    It posts `{"samples": [{"prompt": ..., "completion": ..., "columns": {...}}, ...]}` and accepts `{"scores": [...]}`
    and nothing else: one finite number or null per sample. The address is this argument and nothing else: no redirect
    is followed and no column or answer can change it. The name is looked up, the addresses are checked, and the
    connection goes to an address that was.

    Args:
        url: of the service; https, or http (with a key, on this machine only).
        columns: those that are sent.
        key_env: environment variable that holds the key, sent as a bearer token.
        rows_per_request: samples in a request; a request that fails is a failure of all of them.
        concurrency: requests at a time.
        timeout: seconds for one request.
        most_bytes: of an answer.
        retries: of a request that found no connection or a busy service.
        schemes: those allowed.
        allow_link_local: whether link-local addresses are allowed.

    Raises:
        ValueError: if an argument is out of range, or the URL is not acceptable.
    """

    def __init__(
        self,
        url: str,
        *,
        columns: Sequence[str] = (),
        key_env: str | None = None,
        rows_per_request: int = 64,
        concurrency: int = 1,
        timeout: float = 30.0,
        most_bytes: int = 1 << 20,
        retries: int = 0,
        schemes: Sequence[str] = ("https", "http"),
        allow_link_local: bool = False,
    ) -> None:
        if rows_per_request < 1 or concurrency < 1:
            raise ValueError(f"rows_per_request={rows_per_request} and concurrency={concurrency} must be at least 1")
        self.endpoint = Endpoint(
            url=url, key_env=key_env, timeout=timeout, most_bytes=most_bytes, retries=retries, schemes=tuple(schemes),
            allow_link_local=allow_link_local,
        )  # fmt: skip
        self.columns = tuple(columns)
        self.rows_per_request = rows_per_request
        self.concurrency = concurrency

    def __call__(self, samples: Sequence[Sample]) -> list[float | Exception | None]:
        """Scores samples; those of a failed request have its error."""
        size = self.rows_per_request
        rows = [self._row(sample) for sample in samples]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = in_threads(self._ask, parts, self.concurrency)
        return [score for answer in answers for score in answer]

    def _row(self, sample: Sample) -> dict[str, Any]:
        if missing := [name for name in self.columns if name not in sample.columns]:
            raise ColumnError(f"RemoteReward needs the column {missing[0]!r}, which a sample lacks")
        columns = {name: sample.columns[name] for name in self.columns}
        return {"prompt": sample.prompt, "completion": sample.completion, "columns": columns}

    def _ask(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        try:
            return list(_scores(post_json(self.endpoint, {"samples": rows}), len(rows)))
        except (OSError, ValueError) as error:
            return [error] * len(rows)


def _scores(answer: Any, count: int) -> list[float | None]:
    if not isinstance(answer, dict) or set(answer) != {"scores"} or not isinstance(answer["scores"], list):
        raise Refused("the answer is not of the form {'scores': [...]}")
    scores = answer["scores"]
    if len(scores) != count:
        raise Refused(f"the answer has {len(scores)} scores for {count} samples")
    for i, score in enumerate(scores):
        if score is None:
            continue
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise Refused(f"score {i} of the answer is of type {type(score).__name__}; expected a number or null")
        if (isinstance(score, int) and abs(score) > 2**53) or not math.isfinite(score):
            raise Refused(f"score {i} of the answer is not a finite number")
    return [None if score is None else float(score) for score in scores]
