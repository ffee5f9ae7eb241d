"""One event, one line, whatever is in it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

import pytest

from trl.trackers.events import event_line


def text_of(event: str) -> str:
    return event_line(event).partition(" ")[2]


def test_a_line_begins_with_the_time_in_utc() -> None:
    stamp, _, text = event_line("run created").partition(" ")
    assert text == "run created"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(stamp.replace("Z", "+00:00"))
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ("a\nb\r\nc", "a\\nb\\nc"),
        ("a\tb\rc\x00d", "a bcd"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07end", "red end"),
        ("\u202eright\u2066\u200f to left\u2028", "right to left"),
        ("half a pair \ud800", "half a pair \\ud800"),
        ("Bearer abcdefghijklmnopqrstuvwxyz", "Bearer [redacted]"),
        ("hf_abcdefgh\x00ijklmnop1234", "[redacted]"),  # hidden characters do not save a secret
    ],
)
def test_text_is_made_printable(event: str, line: str) -> None:
    assert text_of(event) == line


def test_a_long_text_says_how_much_is_missing() -> None:
    assert text_of("x" * 20_000) == "x" * 20_000
    assert text_of("x" * 20_007) == "x" * 20_000 + "... (7 more characters)"
