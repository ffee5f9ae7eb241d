"""Findings of the doctor, and findings.jsonl, which holds one per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trl.redaction import redact
from trl.trackers.plain import clean_text

FILE_NAME = "findings.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A sign that a run trains wrongly or not at all: what is seen, in numbers, and what to change."""

    step: int
    """Steps done when it was found; 0: before the first update."""
    code: str
    """Its name, such as "constant-reward"."""
    severity: Literal["warning", "error"]
    """"error": the run cannot train correctly."""
    title: str
    evidence: str
    """The numbers that it was concluded from."""
    remedy: str
    """Likely cause, and the settings to change."""

    @property
    def page(self) -> str:
        """Section of the documentation that shows the failure and its remedy."""
        return f"docs/doctor.md#{self.code}"

    def to_dict(self) -> dict[str, Any]:
        """All fields and `page`, as plain JSON."""
        return {**asdict(self), "page": self.page}

    def __str__(self) -> str:
        head = f"{self.severity} {self.code} (step {self.step}): {self.title}"
        return f"{head} {self.evidence}. {self.remedy} See {self.page}"


def finding_line(finding: Finding) -> str:
    """Serialises a finding as a line of JSON, with secrets redacted."""
    return json.dumps({name: _clean(value) for name, value in finding.to_dict().items()})


def read_findings(folder: str | Path) -> list[Finding]:
    """Reads the findings of a run, in the order in which they were made; [] if there are none.

    Safe while the run is being written: an incomplete or damaged line is left out.

    Args:
        folder: run folder.
    """
    path = Path(folder) / FILE_NAME
    return [finding for finding, _ in complete_findings(path.read_bytes() if path.exists() else b"")]


def complete_findings(data: bytes) -> Iterator[tuple[Finding, bytes]]:
    """Yields each finding with its line, including the line break."""
    names = {field.name for field in fields(Finding)}
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        is_finding = line.endswith(b"\n") and isinstance(entry, dict) and names <= set(entry)
        if is_finding and all(isinstance(entry[name], int if name == "step" else str) for name in names):
            yield Finding(**{name: entry[name] for name in names}), line


def _clean(value: Any) -> Any:
    return redact(clean_text(value)) if isinstance(value, str) else value
