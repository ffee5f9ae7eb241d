"""One server for all runs of a worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Server, started


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with started() as one:
        yield one
