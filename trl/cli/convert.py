"""Turns a YAML node, or the text of a flag, into a value of a setting's type.

Types are those of the dataclasses' fields. Numbers are read as in YAML 1.2 and Python: `3e-4` is a number.
"""

from __future__ import annotations

import collections.abc
import re
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from trl.cli.problems import did_you_mean, shorten
from trl.cli.yaml_nodes import Document

_NULL = ("", "null", "none", "~")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_INTEGER = re.compile(r"[-+]?\d+(?:_\d+)*")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.?inf", re.IGNORECASE)
_MOST_CHOICES = 12  # of a setting that are listed
_LISTS = (list, tuple, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


class ConversionError(ValueError):
    """A value that its setting cannot have.

    Args:
        node: the YAML node that is wrong.
        expected: what the setting takes.
    """

    def __init__(self, node: Any, expected: str) -> None:
        self.node = node
        found = (
            f"{shorten(node.value, 60)!r}" if node.id == "scalar" else {"sequence": "a list"}.get(node.id, "a mapping")
        )
        super().__init__(f"{found} is not {expected}")


def node_of(text: str, kind: Any, name: str) -> tuple[Document, Any]:
    """The node of a flag's or environment variable's text.

    A list may be written `a,b` as well as `[a, b]`, a mapping `a=1,b=2` as well as `{a: 1, b: 2}`.

    Raises:
        UsageError: if the text is not what it begins as.
    """
    import yaml

    parts = alternatives(kind)
    if text[:1] in "[{" and any(is_list(part) or is_mapping(part) for part in parts) and text:
        document = Document(text, name)
        return document, document.root
    document = Document("", name)

    def scalar(value: str) -> Any:
        mark = yaml.Mark(name, 0, 0, 0, None, None)
        return yaml.ScalarNode("", value, mark, mark)

    if str in parts or not any(is_list(part) or is_mapping(part) for part in parts) or text.lower() in _NULL:
        return document, scalar(text)
    items = [item.strip() for item in text.split(",")]
    mark = yaml.Mark(name, 0, 0, 0, None, None)
    if any(is_mapping(part) for part in parts) and all("=" in item for item in items):
        pairs = [item.split("=", 1) for item in items]
        return document, yaml.MappingNode("", [(scalar(k), scalar(v)) for k, v in pairs], mark, mark)
    return document, yaml.SequenceNode("", [scalar(item) for item in items], mark, mark)


def convert(document: Document, node: Any, kind: Any) -> Any:
    """Value of a node as a `kind`.

    Raises:
        ConversionError: if it is none.
        UsageError: if a mapping in it has a key twice.
    """
    parts = alternatives(kind)
    if type(None) in parts and is_null(node):
        return None
    if Any in parts:
        return _plain_value(document, node)
    if node.id == "sequence":
        for part in parts:
            if is_list(part):
                item = (get_args(part) or (Any,))[0]
                return [convert(document, child, item) for child in node.value]
    elif node.id == "mapping":
        for part in parts:
            if is_mapping(part):
                value = (get_args(part) or (str, Any))[1]
                return {key.value: convert(document, child, value) for key, child in document.mapping(node, "this")}
    else:
        for part in parts:
            try:
                return _scalar(node, part)
            except ConversionError:
                continue
    raise ConversionError(node, expected(kind) + _nearest(node, parts))


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; of an enum or its text, the enum alone."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if any(_is_enum(part) for part in parts):
        return tuple(part for part in parts if part is not str)
    return parts


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _choices(kind: Any) -> list[Any]:
    """The values of a `Literal` or an enum; [] for any other type."""
    return (
        [entry.value for entry in kind]
        if _is_enum(kind)
        else list(get_args(kind))
        if get_origin(kind) is Literal
        else []
    )


def is_list(kind: Any) -> bool:
    """Whether a type is that of a list."""
    return (get_origin(kind) or kind) in _LISTS


def is_mapping(kind: Any) -> bool:
    """Whether a type is that of a mapping."""
    return (get_origin(kind) or kind) in _MAPPINGS


def is_null(node: Any) -> bool:
    """Whether a node is an unquoted null."""
    return node.id == "scalar" and node.style is None and node.value.lower() in _NULL


def expected(kind: Any) -> str:
    """A type in words."""
    words = [_words(part) for part in alternatives(kind) if part is not type(None)]
    return " or ".join(words) + (" or null" if type(None) in alternatives(kind) else "")


def _words(kind: Any) -> str:
    if choices := _choices(kind):
        others = len(choices) - _MOST_CHOICES
        more = f" and {others} others" if others > 0 else ""
        return "one of " + ", ".join(map(str, choices[:_MOST_CHOICES])) + more
    if is_list(kind):
        return "a list"
    if is_mapping(kind):
        return "a mapping"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names.get(kind, str(kind))


def _nearest(node: Any, parts: tuple[Any, ...]) -> str:
    choices = [str(choice) for part in parts for choice in _choices(part)]
    return did_you_mean(node.value, choices) if choices and node.id == "scalar" else ""


def _scalar(node: Any, kind: Any) -> Any:
    text = node.value.strip()
    if choices := _choices(kind):
        for choice in choices:
            if str(choice) == text:
                return choice
    elif kind is bool and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    elif kind is int and _INTEGER.fullmatch(text) and len(text) < 20:
        return int(text)
    elif kind is float and _NUMBER.fullmatch(text):
        return float(text.lower().replace(".inf", "inf"))
    elif kind is str and not is_null(node):
        return node.value
    raise ConversionError(node, expected(kind))


def _plain_value(document: Document, node: Any) -> Any:
    """A value without a declared type, read as in YAML 1.2's core schema."""
    if node.id == "sequence":
        return [_plain_value(document, child) for child in node.value]
    if node.id == "mapping":
        return {key.value: _plain_value(document, child) for key, child in document.mapping(node, "this")}
    if node.style is not None:
        return node.value
    if is_null(node):
        return None
    if node.value in ("true", "True", "false", "False"):
        return node.value.lower() == "true"
    for kind in (int, float):
        try:
            return _scalar(node, kind)
        except ConversionError:
            continue
    return node.value
