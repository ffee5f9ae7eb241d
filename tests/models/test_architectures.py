"""Every architecture of docs/models.md, as a tiny model, through everything that this library does with a model.

`make test` has the most used ones, `make slow` all others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.checks import CHECKS, Subject
from tests.models.zoo import EVERYDAY, ZOO, Architecture, everyday

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.filterwarnings("ignore:.*causal_conv1d.*", "ignore:.*mamba_ssm.*")
@pytest.mark.parametrize("architecture", everyday(ZOO))
def test_architecture(architecture: Architecture) -> None:
    subject = Subject(architecture)
    for check in CHECKS.values():
        check(subject)


def test_names_differ() -> None:
    assert len({architecture.name for architecture in ZOO}) == len(ZOO) == 50
    assert {architecture.name for architecture in ZOO} >= EVERYDAY


def test_table_in_the_docs_is_that_of_this_list() -> None:
    """`python scripts/architecture_table.py` writes it, from these very checks."""
    table = PAGE.read_text(encoding="utf-8").split("<!-- architectures -->")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    assert rows[0][2:-1] == list(CHECKS)
    assert [row[0] for row in rows[2:]] == [architecture.name for architecture in ZOO]
    assert {cell for row in rows[2:] for cell in row[2:-1]} == {"yes"}
