"""Texts of unknown origin: nothing hidden in a page, nothing that a terminal obeys."""

from __future__ import annotations

import unicodedata

import pytest

from tests.report.hostile import TEXTS
from trl.untrusted import one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("a\x00b\x1b[31m", "a⟨U+0000⟩b⟨U+001B⟩[31m"),
        ("\u202egnp.exe", "⟨U+202E⟩gnp.exe"),
        ("one\r\ntwo\rthree", "one\ntwo⟨U+000D⟩three"),
        ("\ud800", "⟨U+D800⟩"),
        ("日本語 é 👩‍👦", "日本語 é 👩‍👦"),
    ],
)
def test_hidden_characters_are_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_long_texts_are_cut_with_a_note() -> None:
    assert visible("x" * 12, 10) == "x" * 10 + " … (2 more characters)"
    assert visible("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07 blue\x9b2J\x00", "red blue"),
        ("a\r\nb\u2028c", "a b c"),
        ("\u202eabc", "abc"),
        ("x" * 5000, "x" * 2000),
    ],
)
def test_a_line_for_a_terminal(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_no_text_of_the_corpus_gets_through() -> None:
    assert len(set(TEXTS)) >= 200
    for text in TEXTS:
        line = one_line(text)
        assert line.isprintable() and len(line) <= 2000, text[:50]
        shown = visible(text, 4000)
        shown.encode("utf-8")
        hidden = [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
        assert not hidden and not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
