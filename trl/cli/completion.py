"""Completion scripts for bash, zsh and fish: `eval "$(trl completion bash)"`. They start no Python when used."""

from __future__ import annotations

from trl.cli import catalogue
from trl.cli.arguments import Invocation
from trl.cli.commands import COMMANDS, Command
from trl.cli.problems import UsageError, did_you_mean

_BASH = """\
_trl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" names=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$names" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _trl trl
"""
_ZSH = """\
#compdef trl
_trl() {{
    local -a names
    if (( CURRENT == 2 )); then
        names=({commands})
        _describe command names
        return
    fi
    case "${{words[2]}}" in
{cases}
    esac
    if [[ "$PREFIX" == -* ]]; then compadd -- $names; else _files; fi
}}
compdef _trl trl
"""


def main(invocation: Invocation) -> int:
    """`trl completion SHELL`."""
    (shell,) = invocation.arguments
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    if shell not in scripts:
        raise UsageError(f"{shell} is none of {', '.join(scripts)}{did_you_mean(shell, scripts)}")
    print(scripts[shell](), end="")
    return 0


def words_of(command: Command) -> list[str]:
    """Options and flags of a command."""
    flags = list(catalogue.shortest_flags(command.name).values()) if command.settings else []
    return [*(option.name for option in command.options), *flags, "--help"]


def bash() -> str:
    """The script for bash."""
    cases = "\n".join(f'        {name}) names="{" ".join(words_of(c))}" ;;' for name, c in COMMANDS.items())
    return _BASH.format(commands=" ".join(COMMANDS), cases=cases)


def zsh() -> str:
    """The script for zsh."""
    commands = " ".join(_single(f"{name}:{command.summary}") for name, command in COMMANDS.items())
    cases = "\n".join(f"        {name}) names=({' '.join(words_of(c))}) ;;" for name, c in COMMANDS.items())
    return _ZSH.format(commands=commands, cases=cases)


def fish() -> str:
    """The script for fish."""
    lines = []
    for name, command in COMMANDS.items():
        lines.append(f"complete -c trl -n __fish_use_subcommand -f -a {name} -d {_single(command.summary)}")
        meanings = {option.name: option.meaning for option in command.options}
        if command.settings:
            known = {} if name in catalogue.STAGES else catalogue.settings(name)
            meanings |= {
                flag: known[path].meaning if path in known else path
                for path, flag in catalogue.shortest_flags(name).items()
            }
        for flag, meaning in meanings.items():
            lines.append(
                f"complete -c trl -n '__fish_seen_subcommand_from {name}' -l {flag.removeprefix('--')} -d "
                f"{_single(meaning)}"
            )
    return "\n".join(lines) + "\n"


def _single(text: str) -> str:
    return "'" + text.replace("\\", "").replace("'", "’") + "'"
