"""Samples with little in them."""

from __future__ import annotations

from typing import Any

from trl.rewards import Sample


def sample(completion: str, prompt: str = "say", ids: tuple[int, ...] | None = None, **columns: Any) -> Sample:
    """A completion with a token per word, numbered from 1."""
    own = tuple(range(1, len(completion.split()) + 1)) if ids is None else ids
    return Sample(prompt=prompt, completion=completion, prompt_ids=(7,), completion_ids=own, columns=columns)


def samples(*completions: str) -> list[Sample]:
    return [sample(completion) for completion in completions]
