"""docs/doctor.md: every injected failure gives what the page shows, and every code has a section."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from trl.doctor import CODES

PAGE = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
SECTIONS = {
    title: text for title, text in re.findall(r"^### ([\w-]+)\n(.*?)(?=^#{2,3} |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
SHOWN = [code for code, text in SECTIONS.items() if "```text" in text]
# Of issue 14: what the doctor must name.
DEMANDED = {
    "temperature-mismatch", "padding-changes-logprobs", "dropout-on", "sampling-reshaped", "constant-reward",
    "value-head-scale", "reference-differs", "reference-is-policy", "learning-rate", "not-causal", "dtype-mismatch",
    "truncated",
}  # fmt: skip


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(blocks(PAGE, "python")[0], names)
    return names


def test_every_code_has_a_section_and_no_other() -> None:
    assert set(SECTIONS) == set(CODES)
    assert set(SHOWN) >= DEMANDED


@pytest.mark.parametrize("code", SHOWN)
def test_the_doctor_says_what_the_page_shows(setup: dict[str, Any], code: str) -> None:
    (source,), (expected,) = blocks(SECTIONS[code], "python"), blocks(SECTIONS[code], "text")
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        exec(source, dict(setup))
    said = printed.getvalue()
    assert NUMBER.sub("#", said) == NUMBER.sub("#", expected)
    assert code in said
    pairs = zip(NUMBER.findall(said), NUMBER.findall(expected))
    numbers = [[float(number.replace(",", "")) for number in pair] for pair in pairs]
    # Rounding differs between machines; what is below 1e-5 is rounding.
    assert all(abs(a - b) <= 0.25 * abs(b) + 1e-5 for a, b in numbers), (said, expected)


def test_a_healthy_trainer_is_left_alone(setup: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for settings in ({}, {"dtype": "bfloat16"}, {"temperature": 0.7}):
            names = dict(setup)
            exec(
                "findings = examine(make(**settings), prompts, reward, generation)",
                names | {"settings": settings},
                names,
            )
            assert names["findings"] == [], settings
