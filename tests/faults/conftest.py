"""One server for all runs of a worker, and the runs that nothing happened to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.faults.harness import Server, started

_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with started() as one:
        yield one


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The report of a job to which nothing happens; each job runs once."""
    found: dict[str, dict[str, Any]] = {}

    def report(job: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
        name = json.dumps([job, ranks])
        if name not in found:
            ended = server.run(tmp_path_factory.mktemp("undisturbed"), job, ranks=ranks)
            assert set(ended.statuses) == {0}, ended.log[-3000:]
            found[name] = ended.report
        return found[name]

    return report


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> list[str]:
    """Lines to be shown when all tests are done."""
    return pytestconfig.stash.setdefault(_FIGURES, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)
