"""Plain data of any value: what YAML and JSON hold, and no memory addresses."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trl.trackers.plain import as_number, clean_text, plain, to_json


class Colour(Enum):
    RED = "red"


@dataclass
class Settings:
    rate: float = 0.1
    folder: Path = Path("runs/a")
    api_key: str = "a secret of some length"
    inner: dict[str, Any] = field(default_factory=lambda: {"colour": Colour.RED, 3: (1, 2)})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (Fraction(1, 4), 0.25),
        (Colour.RED, "red"),
        (Path("a/b"), "a/b"),
        ({"b", "a"}, ["a", "b"]),
        (OrderedDict([(1, (2, [3]))]), {"1": [2, [3]]}),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.zeros(65), "<torch:Tensor of shape [65]>"),
        (torch.float16, "torch.float16"),
        (torch.device("cpu"), "cpu"),
        (Settings, f"{__name__}:Settings"),
        (math.sqrt, "math:sqrt"),
        (object(), "<builtins:object>"),
        ("\ud800", "\\ud800"),
        (
            Settings(),
            {"rate": 0.1, "folder": "runs/a", "api_key": "[redacted]", "inner": {"colour": "red", "3": [1, 2]}},
        ),
    ],
)
def test_plain(value: Any, expected: Any) -> None:
    result = plain(value)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, 1), (np.float64(2.5), 2.5), (torch.tensor([[7]]), 7), (torch.tensor(0.5), 0.5), (np.array([3]), 3)],
)
def test_numbers(value: Any, expected: float) -> None:
    number = as_number(value)
    assert number == expected and type(number) in (int, float, bool)


@pytest.mark.parametrize("value", ["1", None, [1], torch.zeros(2), np.array([]), object(), 1j])
def test_no_numbers(value: Any) -> None:
    assert as_number(value) is None


def test_json_is_ascii_and_has_no_nan() -> None:
    text = to_json({"a": [math.nan, -math.inf, 1.5], "b": "é\u2028"})
    assert text.isascii() and json.loads(text) == {"a": [None, None, 1.5], "b": "é\u2028"}
    assert to_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'


def test_lone_surrogates_are_escaped() -> None:
    assert clean_text("a\ud800é") == "a\\ud800é"
