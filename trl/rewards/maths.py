"""Whether a mathematical answer is right, by the package math-verify: `pip install math-verify`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


def math_reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float | None]:
    r"""1 where a completion's answer is equivalent to `answer`, 0 where it is not or there is none to be found.

    math-verify ends its own slow cases only on the main thread of a process: elsewhere, guard it with
    `isolation="process"` and a timeout.

    Args:
        prompts: not read.
        completions: texts with an answer somewhere, best in `\boxed{}`.
        answer: the right answers, in LaTeX or as plain expressions.

    Returns:
        One score per completion; None where the right answer itself cannot be read.

    Raises:
        ImportError: if math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("math_reward needs math-verify: pip install math-verify") from error
    return [_score(math_verify, text, right) for text, right in zip(completions, answer, strict=True)]


def _score(math_verify: Any, completion: str, answer: str) -> float | None:
    # Its timeouts are alarms, which Python allows on the main thread alone.
    here = threading.current_thread() is threading.main_thread()
    parse_options: dict[str, Any] = {} if here else {"parsing_timeout": None}
    verify_options: dict[str, Any] = {} if here else {"timeout_seconds": None}
    # Plain LaTeX is found between dollars only.
    right = math_verify.parse(str(answer), **parse_options) or math_verify.parse(f"${answer}$", **parse_options)
    if not right:
        return None
    found = math_verify.parse(completion, **parse_options)
    return float(bool(found) and bool(math_verify.verify(right, found, **verify_options)))
