"""Report on runs: one self-contained HTML file, or a live page on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl.files import write_atomic
from trl.report.html_page import page
from trl.report.live import serve
from trl.report.reading import read_run
from trl.report.verdict import verdict

__all__ = ["serve", "summary_of", "write_report"]


def summary_of(run: str | Path) -> list[str]:
    """Summary of a run's report in sentences: how it ended, what training achieved, metrics outside their bands.

    Raises:
        ValueError: as `write_report`.
    """
    read = read_run(run, completions=False)
    judged = verdict(read)
    found = (f"{finding.severity.capitalize()}: {finding.title}" for finding in read.findings)
    return [f"{judged.headline}.", *judged.sentences, *found]


def write_report(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Writes the report on one or several runs as a single HTML file that needs no network.

    Args:
        runs: run directory, or several to compare; the first one's settings decide on the healthy bands.
        out: file to write; by default report.html in the first run's folder.

    Returns:
        Path of the file.

    Raises:
        ValueError: if there is no run, or a folder is not a run directory.
        OSError: if the file cannot be written.
    """
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    if not folders:
        raise ValueError("runs is empty: give at least one run directory")
    read = [read_run(folder, share=len(folders)) for folder in folders]
    path = Path(folders[0]) / "report.html" if out is None else Path(out)
    beside = len(read) == 1 and path.resolve().parent == read[0].path
    write_atomic(path, page(read, folder_link=beside).encode("utf-8"))
    return path
