"""Two tiny bundled models and a list of prompts, to run real training without a download.

`scripts/train_embedded.py` makes models and prompts. The model cards describe training data, metrics and limitations.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Literal, get_args

__all__ = ["Name", "path", "prompts"]

Name = Literal["tiny-gpt2-reviews", "tiny-bert-sentiment"]

_FOLDER = Path(__file__).parent


def path(name: Name) -> str:
    """Returns the folder of a bundled model, for `from_pretrained`.

    Args:
        name: "tiny-gpt2-reviews", a language model of film reviews, or "tiny-bert-sentiment", a sentiment classifier of
            film reviews with the labels NEGATIVE and POSITIVE.

    Returns:
        Absolute path of a folder with weights, config, tokenizer and model card.

    Raises:
        ValueError: if the package has no model with that name.
    """
    if name not in get_args(Name):
        near = difflib.get_close_matches(name, get_args(Name), n=1, cutoff=0.4)
        raise ValueError(
            f"no model {name!r} in this package; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + f"The models are {', '.join(get_args(Name))}"
        )
    return str(_FOLDER / name)


def prompts() -> list[str]:
    """Returns about 200 neutral openings of film reviews, 2 to 8 words each, in alphabetical order."""
    found: list[str] = json.loads((_FOLDER / "prompts.json").read_text(encoding="utf-8"))
    return found
