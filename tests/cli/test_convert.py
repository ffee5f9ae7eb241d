"""Values of settings: numbers as in YAML 1.2, the words of flags, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

import pytest

from trl.cli.convert import ConversionError, convert, node_of
from trl.cli.problems import UsageError
from trl.cli.yaml_nodes import Document


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


def test_an_enum_is_its_text_and_nothing_else() -> None:
    """transformers' settings are typed as an enum or any text."""
    assert of_yaml("blue", Colour | str) == of_flag("blue", Colour | str | None) == "blue"
    assert of_yaml("null", Colour | str | None) is None
    with pytest.raises(ConversionError, match=r"'blu' is not one of red, blue: did you mean blue\?"):
        of_yaml("blu", Colour | str)


def of_yaml(text: str, kind: Any) -> Any:
    document = Document(f"key: {text}\n", "c.yaml")
    ((_, node),) = document.pairs()
    return convert(document, node, kind)


def of_flag(text: str, kind: Any) -> Any:
    return convert(*node_of(text, kind, "--x"), kind)


@pytest.mark.parametrize("read", [of_yaml, of_flag])
@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3e-4", float, 3e-4),  # a string in YAML 1.1
        ("1E5", float, 1e5),
        ("1_000", int, 1000),
        (".5", float, 0.5),
        ("-2", int, -2),
        ("7", float, 7.0),
        ("inf", float, math.inf),
        ("null", float | None, None),
        ("None", int | None, None),
        ("yes", bool, True),
        ("off", bool, False),
        ("True", bool | None, True),
        ("no", str, "no"),  # Norway
        ("010", str, "010"),
        ("1.0", str | None, "1.0"),
        ("k3", Literal["kl", "k3"], "k3"),
        ("[1, 2]", Sequence[int] | None, [1, 2]),
        ("{a: 1, b: [x, 2.5]}", dict[str, Any], {"a": 1, "b": ["x", 2.5]}),
        ("{a: '1', b: true, c: null}", dict[str, Any], {"a": "1", "b": True, "c": None}),
        ("{a: 1, b: 2}", dict[str, float], {"a": 1.0, "b": 2.0}),
        ("rewards.py:f", dict[str, str] | list[str] | str, "rewards.py:f"),
    ],
)  # fmt: skip
def test_value(read: Any, text: str, kind: Any, value: Any) -> None:
    found = read(text, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1,2", Sequence[int] | None, [1, 2]),
        ("a=1,b=2", dict[str, float], {"a": 1.0, "b": 2.0}),
        ("", list[str] | None, None),
    ],
)
def test_short_forms_of_flags(text: str, kind: Any, value: Any) -> None:
    assert of_flag(text, kind) == value


def test_quoted_numbers_are_numbers_and_quoted_null_is_a_text() -> None:
    assert of_yaml("'3e-4'", float) == 3e-4
    assert of_yaml("'null'", str | None) == "null"


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("lots", int, "'lots' is not a whole number"),
        ("excluded", Literal["exclude", "leave_out"], "did you mean exclude"),
        ("1.5", int, "'1.5' is not a whole number"),
        ("1e3", int, "not a whole number"),
        ("nan", float, "'nan' is not a number"),
        ("1", bool, "'1' is not true or false"),
        ("k4", Literal["kl", "k3"], "'k4' is not one of kl, k3"),
        ("[1, x]", Sequence[int] | None, "'x' is not a whole number"),
        ("[1]", int | None, "a list is not a whole number or null"),
        ("{a: 1}", str, "a mapping is not a text"),
        ("null", int, "'null' is not a whole number"),
        ("9" * 5000, int, "is not a whole number"),
    ],
)
def test_refused(text: str, kind: Any, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        of_yaml(text, kind)


def test_a_key_twice_in_a_mapping_of_free_form() -> None:
    with pytest.raises(UsageError, match="a is already given"):
        of_yaml("{a: 1, a: 2}", dict[str, Any])
