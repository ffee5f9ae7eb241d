"""Math correctness reward, using math-verify (`pip install math-verify`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


def math_reward(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float | None]:
    r"""Scores 1 if a completion's answer is equivalent to `answer`, 0 if it is not or no answer is found.

    math-verify's own timeouts work only in the main thread of a process: elsewhere, use `isolation="process"` and a
    timeout.

    Args:
        prompts: unused.
        completions: texts containing an answer, ideally in `\boxed{}`.
        answer: reference answers, in LaTeX or as plain expressions.

    Returns:
        One score per completion; None if the reference answer cannot be parsed.

    Raises:
        ImportError: if math-verify is not installed.
    """
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("math_reward needs math-verify: pip install math-verify") from error
    return [_score(math_verify, text, reference) for text, reference in zip(completions, answer, strict=True)]


def _score(math_verify: Any, completion: str, answer: str) -> float | None:
    # Its timeouts use signal alarms, which Python allows only in the main thread.
    in_main_thread = threading.current_thread() is threading.main_thread()
    parse_options: dict[str, Any] = {} if in_main_thread else {"parsing_timeout": None}
    verify_options: dict[str, Any] = {} if in_main_thread else {"timeout_seconds": None}
    # LaTeX is only recognized between dollar signs.
    reference = math_verify.parse(str(answer), **parse_options) or math_verify.parse(f"${answer}$", **parse_options)
    if not reference:
        return None
    candidate = math_verify.parse(completion, **parse_options)
    return float(bool(candidate) and bool(math_verify.verify(reference, candidate, **verify_options)))
