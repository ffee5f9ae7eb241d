"""Lines of events.log: one event each, safe to show in a terminal."""

from __future__ import annotations

import re
from datetime import datetime, timezone

from trl.redaction import redact
from trl.trackers.plain import clean_text

_LONGEST = 20_000  # characters
_ESCAPE_SEQUENCE = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?")
# Control characters, separators of lines, and marks that reorder what is shown.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def event_line(text: str) -> str:
    """UTC time and text on one line: no secrets, no control characters, line breaks written as two characters."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    # Twice: a line break may stand inside a secret, and taking out a control character may put one together.
    text = redact(_printable(redact(str(text))))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text) - _LONGEST} more characters)"
    return f"{now} {text}"


def _printable(text: str) -> str:
    """Without terminal sequences, control characters, and marks that reorder a line."""
    text = _ESCAPE_SEQUENCE.sub("", clean_text(text)).replace("\r\n", "\n").replace("\n", "\\n").replace("\t", " ")
    return _HIDDEN.sub("", text)
