"""Reads a command line: arguments, options of the command, and flags of settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl.cli.commands import Command
from trl.cli.problems import Problem, UsageError, did_you_mean

_BOOLEANS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A command with what it was given."""

    command: Command
    arguments: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by name without dashes; "" for a switch
    flags: tuple[Any, ...] = ()  # `trl.cli.resolve.Flag`, of settings
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def has(self, name: str) -> bool:
        """Whether a switch was given."""
        return name in self.options

    def option(self, name: str) -> str | None:
        """The last value of an option."""
        return self.options[name][-1] if name in self.options else None

    def number(self, name: str, kind: type = int) -> Any:
        """The last value of an option as a number.

        Raises:
            UsageError: if it is none.
        """
        text = self.option(name)
        if text is None:
            return None
        try:
            return kind(text)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise UsageError([Problem(text=f"{text!r} is not {expected}", where=f"--{name}")]) from error


def read(command: Command, words: Sequence[str]) -> Invocation:
    """Reads what follows the name of a command.

    `--learning_rate` is `--learning-rate`; a value follows after a space or `=`; `--no-x` is `--x=false`.

    Raises:
        UsageError: for an unknown option, a missing value or a wrong number of arguments.
    """
    arguments: list[str] = []
    options: dict[str, tuple[str, ...]] = {}
    texts: dict[str, tuple[str, tuple[str, ...]]] = {}  # spelling and values, by the setting's path
    rest = list(words)
    settings_of = _run_command(words) if command.name == "resume" else command.name
    while rest:
        word = rest.pop(0)
        if word == "--":
            arguments += rest
            break
        if not word.startswith("--") or len(word) == 2:
            if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
                raise UsageError(f"{word} is no option; options begin with two dashes (trl {command.name} --help)")
            arguments.append(word)
            continue
        spelling, equals, value = word.partition("=")
        name = spelling[2:].replace("_", "-")
        option = next((option for option in command.options if option.name[2:] == name), None)
        if option is not None:
            if option.value and not equals:
                value = _next_value(rest, spelling)
            elif equals and not option.value:
                raise UsageError(f"{spelling} takes no value")
            before = options.get(name, ()) if option.repeated else ()
            options[name] = (*before, value)
            continue
        path, value = _setting(command, settings_of, spelling, name, value if equals else None, rest)
        repeated = path in ("reward.functions",)
        before = texts[path][1] if repeated and path in texts else ()
        texts[path] = (spelling, (*before, value))
    least, most = command.arguments
    if not least <= len(arguments) <= (len(arguments) if most is None else most):
        count = f"{len(arguments)} arguments" if len(arguments) != 1 else "1 argument"
        raise UsageError(
            [Problem(text=f"{count} given"), Problem(text=f"trl {command.name} {command.usage}", where="usage")]
        )
    return Invocation(command=command, arguments=tuple(arguments), options=options, flags=_flags(texts, settings_of))


def _run_command(words: Sequence[str]) -> str:
    """Returns the command that started the run named by a word; "ppo" if no word names a run."""
    from trl.cli.launch import command_of_run

    found = (command_of_run(word) for word in words if not word.startswith("-"))
    return next((command for command in found if command is not None), "ppo")


def _setting(
    command: Command, settings_of: str, spelling: str, name: str, value: str | None, rest: list[str]
) -> tuple[str, str]:
    """Path and value of a setting's flag; takes the value from `rest` if it is a word of its own."""
    if command.settings:
        from trl.cli import catalogue

        known = name.replace("-", "_")
        setting = catalogue.find(known, command=settings_of)
        if isinstance(setting, str) and known.startswith("no_"):
            positive = catalogue.find(known.removeprefix("no_"), command=settings_of)
            if not isinstance(positive, str) and _is_switch(positive.kind) and value is None:
                return positive.path, "false"
        if not isinstance(setting, str):
            if value is None and _is_switch(setting.kind):
                value = rest.pop(0) if rest and rest[0].lower() in _BOOLEANS else "true"
            return setting.path, _next_value(rest, spelling) if value is None else value
        if (path := setting.removeprefix(": use ")) in catalogue.settings():
            setting = f": use {catalogue.shortest_flag(path)}"
        if setting and "did you mean" not in setting:
            raise UsageError(f"{spelling} is no setting{setting}")
        names = [
            *(option.name[2:] for option in command.options),
            *(n.replace("_", "-") for n in catalogue.flags(settings_of)),
        ]
    else:
        names = [option.name[2:] for option in command.options]
    near = did_you_mean(name, names).replace("mean ", "mean --")
    raise UsageError(f"{spelling} is no option of trl {command.name}{near}")


def _next_value(rest: list[str], spelling: str) -> str:
    if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
        raise UsageError(f"{spelling} needs a value")
    return rest.pop(0)


def _is_switch(kind: Any) -> bool:
    from trl.cli.convert import alternatives

    return bool in alternatives(kind)


def _flags(texts: Mapping[str, tuple[str, tuple[str, ...]]], command: str) -> tuple[Any, ...]:
    if not texts:
        return ()
    from trl.cli import catalogue
    from trl.cli.resolve import Flag

    return tuple(
        Flag(setting=catalogue.settings(command)[path], texts=values, spelling=spelling)
        for path, (spelling, values) in texts.items()
    )
