"""Reads YAML into nodes that know their line, with nothing in it that could build an object.

Only plain YAML passes: mappings with distinct text keys, lists and scalars. Tags, anchors, aliases and merge keys are
refused: nothing can be executed, and a small file stays small in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl.cli.problems import Problem, UsageError

MAX_BYTES = 1 << 20  # of a configuration file


class Document:
    """A YAML text with its name, for messages."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.lines = text.splitlines()
        self.root = self._compose(text)

    @classmethod
    def load(cls, path: str | Path) -> Document:
        """Reads a file.

        Raises:
            UsageError: if it cannot be read or is not plain YAML; names file and line.
        """
        name = str(path)
        try:
            if not Path(path).is_file():
                raise UsageError([Problem(text="there is no such file", where=name)])
            with open(path, "rb") as file:
                data = file.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise UsageError([Problem(text=getattr(error, "strerror", None) or str(error), where=name)]) from error
        if len(data) > MAX_BYTES:
            raise UsageError(
                [Problem(text=f"more than {MAX_BYTES >> 20} MiB, too long for a configuration", where=name)]
            )
        try:
            return cls(data.decode("utf-8-sig"), name)
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise UsageError([Problem(text="not UTF-8 text", where=f"{name}:{line}")]) from error

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Key and value nodes of the top-level mapping; none for an empty document.

        Raises:
            UsageError: if it is not a mapping.
        """
        if self.root is not None:
            yield from self.mapping(self.root, "a configuration")

    def mapping(self, node: Any, name: str) -> Iterator[tuple[Any, Any]]:
        """Key and value nodes of a mapping. A key that is no text or occurs twice is a problem; the others are yielded.

        Raises:
            UsageError: if it is no mapping; or at the end, with the problems.
        """
        if node.id != "mapping":
            kind = {"sequence": "a list", "scalar": "a value"}[node.id]
            raise self.error(node, f"{name} is a mapping of names to values, not {kind}")
        seen: dict[str, Any] = {}
        problems = []
        for key, value in node.value:
            if key.id != "scalar":
                problems.append(self.problem(key, "a key must be a name"))
            elif key.value in seen:
                line = self.line_of(seen[key.value])
                problems.append(self.problem(key, f"{key.value} is already given in line {line}"))
            else:
                seen[key.value] = key
                yield key, value
        if problems:
            raise UsageError(problems)

    def line_of(self, node: Any) -> int:
        """Line of a node, from 1."""
        return int(node.start_mark.line) + 1

    def where(self, node: Any) -> str:
        """Place of a node, such as "run.yaml:3"."""
        return f"{self.name}:{self.line_of(node)}"

    def problem(self, node: Any, text: str) -> Problem:
        """A problem with a node."""
        return self._problem(self.line_of(node), text)

    def error(self, node: Any, text: str) -> UsageError:
        """An error about a node."""
        return UsageError([self.problem(node, text)])

    def _problem(self, line: int, text: str) -> Problem:
        content = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        return Problem(text=text, where=f"{self.name}:{line}", line=content)

    def _compose(self, text: str) -> Any:
        import yaml

        class PlainLoader(yaml.SafeLoader):
            def compose_node(self, parent: Any, index: Any) -> Any:
                event = self.peek_event()
                if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
                    raise yaml.MarkedYAMLError(
                        problem="anchors and aliases are not read", problem_mark=event.start_mark
                    )
                if getattr(event, "tag", None) is not None:
                    raise yaml.MarkedYAMLError(
                        problem=f"the tag {event.tag} is not read: values are plain text, numbers, lists and mappings",
                        problem_mark=event.start_mark,
                    )
                return super().compose_node(parent, index)

        try:
            return yaml.compose(text, Loader=PlainLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = 1 if mark is None else mark.line + 1
            reason = error.problem or error.context or "not valid YAML"
            if mark is not None and "\t" in self._line(line)[: mark.column + 1]:
                reason = "a tab: YAML is indented with spaces"
            raise UsageError([self._problem(line, reason)]) from error
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            code = error.character if isinstance(error.character, int) else ord(error.character)
            raise UsageError([self._problem(line, f"the character U+{code:04X} is not allowed")]) from error
        except RecursionError as error:
            raise UsageError([Problem(text="lists or mappings are nested too deep", where=self.name)]) from error

    def _line(self, line: int) -> str:
        return self.lines[line - 1] if 0 < line <= len(self.lines) else ""
