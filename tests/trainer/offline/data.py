"""Rows, settings and a model folder that the tests of the offline trainers share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.helpers import tiny_gpt2, tiny_llama, tiny_tokenizer

TURN = "w5{{ '0' if m['role'] == 'user' else '1' }} {{ m['content'] }} w1 "
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}w51 {% endif %}"


# The tokenizer reads w10 as w1 and 0, since w0 to w3 are special.
_WORDS = [*range(4, 10), *range(40, 50), *range(52, 60)]


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.choice(_WORDS)}" for _ in range(count))


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 2 to 9 words."""
    return [{"text": words(2 + (index + seed) % 8, 100 * seed + index)} for index in range(count)]


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": words(3, i), "completion": " " + words(2 + i % 3, i + 50)} for i in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": words(3, i)},
                {"role": "assistant", "content": words(2, i + 50)},
            ]
        }
        for i in range(count)
    ]


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_folder(folder: Path, kind: str = "llama") -> str:
    """A folder with a tiny model and its tokenizer."""
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def quiet(**settings: Any) -> dict[str, Any]:
    """Settings of a short run on the CPU that writes nothing and prints nothing."""
    return {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "max_steps": 2,
    } | settings
