"""Errors of usage: what is wrong, where, and the nearest name that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trl.untrusted import one_line, visible

_SHOWN = 8  # problems in one message: it fits on a screen
_LONGEST = 700  # characters of one problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    text: str
    where: str = ""  # "run.yaml:3", "environment TRL_PPO__SEED", "--seed"; empty if it has no place
    line: str = ""  # that line of the file


class UsageError(Exception):
    """Invalid arguments or settings: printed without a traceback, exit code 2."""

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        self.problems = [Problem(text=problems)] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(problem.text for problem in self.problems))

    def __str__(self) -> str:
        """The message, one problem per paragraph, without control characters."""
        lines = []
        for problem in self.problems[:_SHOWN]:
            lines.append(shorten(f"{problem.where}: {problem.text}" if problem.where else problem.text))
            if problem.line.strip():
                lines.append(f"    | {visible(problem.line[:100])}")
        if (rest := len(self.problems) - _SHOWN) > 0:
            lines.append(f"... and {rest} more")
        return "\n".join(lines)


def shorten(text: str, longest: int = _LONGEST) -> str:
    """One line of at most `longest` characters, without control characters."""
    text = one_line(text)
    return text if len(text) <= longest else text[: longest - 4] + " ..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End of a sentence, ": did you mean x?", with the nearest of the known names; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
