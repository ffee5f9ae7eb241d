"""The text of `trl --help` and `trl COMMAND --help`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator

from trl.cli.commands import COMMANDS, Command

_INDENT = 28  # columns for the names of options


def overview() -> str:
    """Lists the commands."""
    lines = ["usage: trl COMMAND ...", "", "Reinforcement learning for language models.", ""]
    lines += _table((command.name, command.summary) for command in COMMANDS.values())
    lines += ["", "trl COMMAND --help describes a command. A first run, offline:", ""]
    lines += ["  trl config init run.yaml", "  trl ppo run.yaml"]
    return "\n".join(lines)


def of_command(command: Command) -> str:
    """Describes a command and everything that it takes."""
    lines = [f"usage: trl {command.name} {command.usage}", "", command.summary[:1].upper() + command.summary[1:] + "."]
    if command.example:
        lines += ["", f"  {command.example}"]
    if command.options:
        options = [(f"{option.name} {option.value}".strip(), option.meaning) for option in command.options]
        lines += ["", "Options", *_table(options)]
    if command.settings:
        lines += _settings(command)
    return "\n".join(lines)


def _settings(command: Command) -> Iterator[str]:
    from trl.cli import catalogue
    from trl.cli.convert import expected
    from trl.cli.resolve import COMMAND_DEFAULTS

    yield ""
    yield from textwrap.wrap(
        "Settings stand in YAML files, by section; in environment variables, such as TRL_PPO__LEARNING_RATE; and in "
        "flags, such as --learning-rate or --ppo.learning-rate. Later files count over earlier ones, variables over "
        "files, and flags over all.",
        _width(),
    )
    changed = COMMAND_DEFAULTS.get(command.name, {})
    flags = catalogue.shortest_flags(command.name)
    for section in catalogue.sections_of(command.name):
        if section in ("ppo", "grpo") and section != command.name and section == "grpo":
            continue
        yield ""
        about = catalogue.section_class(section, command.name).__doc__ or ""
        yield from textwrap.wrap(f"{section}: {about.strip().splitlines()[0]}", _width())
        for path, setting in catalogue.settings(command.name).items():
            if setting.section == section:
                default = changed.get(path, setting.default)
                shown = (
                    ""
                    if default in (None, {}, [])
                    else f" [{str(default).lower() if isinstance(default, bool) else default}]"
                )
                meaning = f"{setting.meaning} ({expected(setting.kind).removesuffix(' or null')}){shown}"
                yield from _table([(flags[path], meaning)])


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, meaning in rows:
        wrapped = textwrap.wrap(meaning, max(20, _width() - _INDENT - 2)) or [""]
        if len(name) > _INDENT - 2:
            yield f"  {name}"
        else:
            yield f"  {name:<{_INDENT}}{wrapped.pop(0)}"
        yield from (" " * (_INDENT + 2) + line for line in wrapped)


def _width() -> int:
    return min(110, shutil.get_terminal_size((100, 24)).columns)
