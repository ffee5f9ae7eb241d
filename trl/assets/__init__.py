"""Two tiny models and a list of prompts that come with the package, so that something real runs without a download.

`scripts/train_embedded.py` made them. Their folders hold model cards with the data, the measurements and the limits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

__all__ = ["Name", "path", "prompts"]

Name = Literal["tiny-gpt2-reviews", "tiny-bert-sentiment"]

_FOLDER = Path(__file__).parent


def path(name: Name) -> str:
    """Returns the folder of a model of the package, for `from_pretrained`.

    Args:
        name: "tiny-gpt2-reviews", a language model that writes film reviews, or "tiny-bert-sentiment", a classifier of
            film reviews with the labels NEGATIVE and POSITIVE.

    Returns:
        The absolute path of a folder with weights, configuration, tokenizer and model card.

    Raises:
        ValueError: if there is no model of that name.
    """
    if name not in get_args(Name):
        raise ValueError(f"no model {name!r} in this package; there are {', '.join(get_args(Name))}")
    return str(_FOLDER / name)


def prompts() -> list[str]:
    """Returns about 200 neutral openings of film reviews, 2 to 8 words each, in alphabetical order."""
    found: list[str] = json.loads((_FOLDER / "prompts.json").read_text(encoding="utf-8"))
    return found
