"""Makes text of unknown origin, such as a model's, safe to show: in a page, on a terminal, in a spreadsheet."""

from __future__ import annotations

import re
import unicodedata

ESCAPE_SEQUENCES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?")
"""Escape sequences of terminals: CSI and OSC."""
# Control characters but for tab and line feed, bidirectional marks, line separators, lone surrogates, invisible tags.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_LONGEST_LINE = 2000  # characters


def visible(text: str, limit: int | None = None) -> str:
    """Returns `text` with every hidden character spelt out, such as ⟨U+202E⟩, so that nothing reorders or hides text.

    Args:
        text: may contain lone surrogates.
        limit: maximum number of characters of `text`; a note says how many more there are.
    """
    cut = text if limit is None else text[:limit]
    shown = _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", cut.replace("\r\n", "\n"))
    return shown if len(cut) == len(text) else f"{shown} … ({len(text) - len(cut):,} more characters)"


def one_line(text: str) -> str:
    """The first characters of `text` on one line, without escape sequences, control characters and bidi marks."""
    text = ESCAPE_SEQUENCES.sub("", text[:_LONGEST_LINE])
    text = " ".join(text.split())
    return (
        text
        if text.isprintable()
        else "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    )
