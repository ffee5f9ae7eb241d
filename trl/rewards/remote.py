"""Reward from a remote scoring service over HTTP."""

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
    """Requests scores from an HTTP service.

    It posts `{"samples": [{"prompt": ..., "completion": ..., "columns": {...}}, ...]}` and accepts only
    `{"scores": [...]}` with one finite number or null per sample. Requests go to `url` alone: redirects are not
    followed, and no column or answer can change the address. The host's resolved addresses are checked, and the
    connection is made to one of those.

    Args:
        url: URL of the service: https, or http (to this machine only if a key is sent).
        columns: dataset columns to send.
        key_env: environment variable holding the API key, sent as a bearer token.
        rows_per_request: samples per request; if a request fails, all of its samples fail.
        concurrency: requests in flight.
        timeout: seconds per attempt.
        most_bytes: maximum size of an answer in bytes.
        retries: retries after a connection error or from a busy service.
        schemes: allowed URL schemes.
        allow_link_local: whether to allow link-local and cloud metadata addresses.

    Raises:
        ValueError: if an argument is out of range or the URL is not acceptable.
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
        """Returns one score per sample, None if unscorable; samples of a failed request get its exception."""
        rows_per_request = self.rows_per_request
        rows = [self._row(sample) for sample in samples]
        requests = [rows[start : start + rows_per_request] for start in range(0, len(rows), rows_per_request)]
        answers = in_threads(self._request_scores, requests, self.concurrency)
        return [score for answer in answers for score in answer]

    def _row(self, sample: Sample) -> dict[str, Any]:
        if missing := [name for name in self.columns if name not in sample.columns]:
            raise ColumnError(f"RemoteReward needs the column {missing[0]!r}, which a sample lacks")
        columns = {name: sample.columns[name] for name in self.columns}
        return {"prompt": sample.prompt, "completion": sample.completion, "columns": columns}

    def _request_scores(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
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
