"""Formats the lines of events.log, one event each, safe to print to a terminal."""

from __future__ import annotations

import re
from datetime import datetime, timezone

from trl.redaction import redact
from trl.trackers.plain import clean_text
from trl.untrusted import ESCAPE_SEQUENCES

_MAX_LENGTH = 20_000  # characters
# Control characters, line separators and bidirectional formatting marks.
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def event_line(text: str) -> str:
    """Formats UTC time and text as one line: secrets redacted, control characters removed, line breaks escaped."""
    timestamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    # Redact twice: a secret may contain a line break, and removing a control character may join up another.
    text = redact(_printable(redact(str(text))))
    if len(text) > _MAX_LENGTH:
        text = f"{text[:_MAX_LENGTH]}... ({len(text) - _MAX_LENGTH} more characters)"
    return f"{timestamp} {text}"


def _printable(text: str) -> str:
    """Removes terminal escape sequences, control characters and bidirectional formatting marks."""
    text = ESCAPE_SEQUENCES.sub("", clean_text(text)).replace("\r\n", "\n").replace("\n", "\\n").replace("\t", " ")
    return _HIDDEN.sub("", text)
