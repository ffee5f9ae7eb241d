"""Puts settings together: defaults, then files from left to right, then the environment, then flags.

Every value keeps where it came from. All problems are collected and reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trl.cli import catalogue
from trl.cli.catalogue import Setting
from trl.cli.convert import ConversionError, convert, is_null, node_of
from trl.cli.problems import Problem, UsageError, did_you_mean
from trl.cli.yaml_nodes import Document

DEFAULT = "default"
_PREFIX = "TRL_"
# Defaults of one command that differ from the dataclass's.
COMMAND_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"ppo.group_size": 8},
    **{stage: {f"{section}.save_total_limit": 2} for stage, section in catalogue.STAGES.items()},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value from a file, the environment or a flag, with its source."""

    setting: Setting
    value: Any
    source: str  # "run.yaml:3", "environment TRL_PPO__SEED", "--seed"
    line: str = ""  # that line of the file
    places: Mapping[str, str]  # source of each key inside a mapping, by its path: "reward.options.short.longest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A setting given on the command line."""

    setting: Setting
    texts: tuple[str, ...]
    spelling: str  # "--learning-rate"


@dataclass(frozen=True, slots=True)
class Resolved:
    """All settings with their values and sources."""

    values: Mapping[str, Any]  # by path
    sources: Mapping[str, str]  # by path
    given: Mapping[str, Given]  # those that are not defaults, by path
    command: str = "ppo"

    def __getitem__(self, path: str) -> Any:
        """Value of a setting, by its path."""
        return self.values[path]

    def section(self, name: str) -> Any:
        """A section as its dataclass.

        Raises:
            UsageError: if its values contradict each other or are out of range; names the place of one that does.
        """
        values = {
            setting.name: self.values[path]
            for path, setting in catalogue.settings(self.command).items()
            if setting.section == name
        }
        if name == catalogue.STAGES.get(self.command):
            values["output_dir"] = str(self.values["train.run_dir"] or self.values["train.root"])
            values["report_to"] = values["report_to"] or "none"  # which is null in our YAML
        try:
            return catalogue.section_class(name, self.command)(**values)
        except (ValueError, TypeError) as error:
            raise UsageError([self.problem(str(error), name)]) from error

    def problem(self, text: str, section: str | None = None) -> Problem:
        """A problem, with the place of the first given setting that its text names as `setting=`.

        Args:
            text: the message of an error.
            section: the section that is meant; None for any.
        """
        for name in re.findall(r"(\w+)=", text):
            for given in self.given.values():
                owner = given.setting.section
                if given.setting.name == name and section in (None, owner):
                    full = f"{owner}.{text}" if text.startswith(f"{name}=") else text
                    return Problem(text=full, where=given.source, line=given.line)
        return Problem(text=text, where=section or "")

    def place(self, path: str) -> str:
        """Source of a setting, or of a key inside a mapping."""
        setting = ".".join(path.split(".")[:2])
        given = self.given.get(setting)
        return self.sources.get(setting, "") if given is None else given.places.get(path, given.source)

    def with_value(self, path: str, value: Any, source: str) -> Resolved:
        """A copy with another value."""
        return replace(self, values={**self.values, path: value}, sources={**self.sources, path: source})

    def nested(self) -> dict[str, dict[str, Any]]:
        """Values by section and name."""
        sections: dict[str, dict[str, Any]] = {}
        for path, value in self.values.items():
            section, _, name = path.partition(".")
            sections.setdefault(section, {})[name] = value
        return sections


class Collector:
    """Collects values and problems, layer by layer.

    Args:
        command: the command that reads them. Sections that only other commands read are checked and left out.
    """

    def __init__(self, command: str = "ppo") -> None:
        self._command = command
        self.given: dict[str, Given] = {}
        self.problems: list[Problem] = []

    def add_file(self, path: str) -> None:
        """Adds a YAML file."""
        try:
            self.add_document(Document.load(path))
        except UsageError as error:
            self.problems += error.problems

    def add_document(self, document: Document) -> None:
        """Adds a YAML document with sections."""
        layer: dict[str, tuple[Any, Given]] = {}
        try:
            for key, value in document.pairs():
                name = key.value.strip().replace("-", "_")
                is_section = name in catalogue.SECTIONS and (value.id == "mapping" or name not in catalogue.SHORTHAND)
                if not is_section:
                    self._add_plain(document, key, name, value, layer)
                elif not is_null(value):
                    self._add_section(document, name, value, layer)
        except UsageError as error:
            self.problems += error.problems
        known = catalogue.sections_of(self._command)
        self.given |= {path: given for path, (_, given) in layer.items() if given.setting.section in known}

    def _add_plain(
        self, document: Document, key: Any, name: str, node: Any, layer: dict[str, tuple[Any, Given]]
    ) -> None:
        """Adds a setting at the top level, or the value that is short for a section."""
        section = None
        if name in catalogue.SHORTHAND:
            section, _, name = catalogue.shorthand(name, catalogue.owner(name, self._command)).partition(".")
        self._add_value(document, key, name, section, node, layer)

    def _add_section(self, document: Document, name: str, node: Any, layer: dict[str, tuple[Any, Given]]) -> None:
        try:
            for key, value in document.mapping(node, name):
                self._add_value(document, key, key.value, name, value, layer)
        except UsageError as error:
            self.problems += error.problems

    def _add_value(
        self,
        document: Document,
        key: Any,
        name: str,
        section: str | None,
        node: Any,
        layer: dict[str, tuple[Any, Given]],
    ) -> None:
        command = self._command if section is None else catalogue.owner(section, self._command)
        setting = catalogue.find(name, section, command)
        if isinstance(setting, str):
            full = name if section is None else f"{section}.{name}"
            self.problems.append(document.problem(key, f"{full} is no setting{setting}"))
            return
        if setting.path in layer:
            line = document.line_of(layer[setting.path][0])
            self.problems.append(document.problem(key, f"{setting.path} is already given in line {line}"))
            return
        try:
            value = convert(document, node, setting.kind)
        except ConversionError as error:
            self.problems.append(document.problem(error.node, f"{setting.path}: {error}"))
            return
        except UsageError as error:
            self.problems += error.problems
            return
        places = dict(_places(document, node, setting.path))
        problem = document.problem(key, "")
        given = Given(setting=setting, value=value, source=document.where(key), line=problem.line, places=places)
        layer[setting.path] = (key, given)

    def add_environment(self, environment: Mapping[str, str]) -> None:
        """Adds variables such as TRL_PPO__LEARNING_RATE: `TRL_`, the section, two underscores, the setting."""
        for variable in sorted(environment):
            words = variable.removeprefix(_PREFIX)
            section, separator, name = words.lower().partition("__")
            if variable == words or not (separator or section.partition("_")[0] in catalogue.SECTIONS):
                continue  # such as TRL_KERNELS, which is no setting of a run
            where = f"environment {variable}"
            if not separator:
                section, _, name = section.partition("_")
                known = section in catalogue.sections_of(self._command) and f"{section}.{name}" in catalogue.settings(
                    self._command
                )
                hint = f": write {_PREFIX}{section.upper()}__{name.upper()}" if known else ", and its name has no __"
                self.problems.append(Problem(text=f"it sets nothing{hint}", where=where))
                continue
            if section not in catalogue.SECTIONS:
                near = did_you_mean(section, catalogue.SECTIONS)
                self.problems.append(Problem(text=f"{section} is no section{near}", where=where))
                continue
            if section not in catalogue.sections_of(self._command):
                continue
            setting = catalogue.find(name, section, self._command)
            if isinstance(setting, str):
                self.problems.append(Problem(text=f"{section}.{name} is no setting{setting}", where=where))
            else:
                self._add_texts(setting, (environment[variable],), where)

    def add_flags(self, flags: Sequence[Flag]) -> None:
        """Adds flags."""
        known = catalogue.settings(self._command)
        for flag in flags:
            if flag.setting.path in known:
                self._add_texts(flag.setting, flag.texts, flag.spelling)
            else:
                self.problems.append(
                    Problem(text=f"{flag.setting.path} is no setting of trl {self._command}", where=flag.spelling)
                )

    def _add_texts(self, setting: Setting, texts: tuple[str, ...], where: str) -> None:
        text = texts[0] if len(texts) == 1 else f"[{', '.join(_quoted(text) for text in texts)}]"
        try:
            document, node = node_of(text, setting.kind, where)
            value = convert(document, node, setting.kind)
        except ConversionError as error:
            self.problems.append(Problem(text=f"{setting.path}: {error}", where=where))
        except UsageError as error:
            self.problems += [replace(problem, where=where, line="") for problem in error.problems]
        else:
            self.given[setting.path] = Given(setting=setting, value=value, source=where, places={})

    def resolved(self, command: str) -> Resolved:
        """All settings for a command.

        Raises:
            UsageError: with every problem so far, or those of the sections.
        """
        if self.problems:
            raise UsageError(self.problems)
        values, sources = {}, {}
        changed = COMMAND_DEFAULTS.get(command, {})
        for path, setting in catalogue.settings(command).items():
            given = self.given.get(path)
            values[path] = changed.get(path, setting.default) if given is None else given.value
            sources[path] = (
                (f"default of trl {command}" if path in changed else DEFAULT) if given is None else given.source
            )
        resolved = Resolved(values, sources, self.given, command)
        for section in catalogue.sections_of(command):
            try:
                checked = resolved.section(section)
            except UsageError as error:
                self.problems += error.problems
            else:
                if section == "reward":  # by name from here on
                    values |= {f"reward.{name}": getattr(checked, name) for name in ("functions", "weights")}
        if self.problems:
            raise UsageError(self.problems)
        return resolved


def resolve(
    command: str, *, files: Sequence[str] = (), environment: Mapping[str, str], flags: Sequence[Flag] = ()
) -> Resolved:
    """Settings of a command from files, environment and flags.

    Raises:
        UsageError: with every problem found.
    """
    collector = Collector(command)
    for path in files:
        collector.add_file(path)
    collector.add_environment(environment)
    collector.add_flags(flags)
    return collector.resolved(command)


def _places(document: Document, node: Any, path: str) -> Any:
    yield path, document.where(node)
    if node.id == "mapping":
        for key, value in node.value:
            yield from _places(document, value, f"{path}.{key.value}")
            yield f"{path}.{key.value}", document.where(key)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
