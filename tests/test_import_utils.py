"""What releases of other packages call things."""

from __future__ import annotations

import pytest

from trl.import_utils import cache_keyword


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        (["input_ids", "past_key_values"], "past_key_values"),
        (["input_ids", "cache"], "cache"),
        (["input_ids", "cache", "past_key_values"], "past_key_values"),  # a model's own code, and a cache of its own
        (["input_ids", "kwargs"], "past_key_values"),
    ],
)
def test_cache_keyword(parameters: list[str], keyword: str) -> None:
    assert cache_keyword(parameters) == keyword
