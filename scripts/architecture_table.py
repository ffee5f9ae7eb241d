"""Puts every architecture through the checks of tests/models and writes the table of docs/models.md.

python scripts/architecture_table.py          # writes
python scripts/architecture_table.py --check  # only says whether it would change
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
MARK = "<!-- architectures -->"


def result(check: object, subject: object) -> str:
    """ "yes", or what went wrong."""
    try:
        check(subject)  # type: ignore[operator]
    except Exception as error:
        print(f"{subject.architecture.name}: {check.__name__}: {error!r}", file=sys.stderr)  # type: ignore[attr-defined]
        return f"no ({type(error).__name__})"
    return "yes"


def table() -> str:
    """The table, in Markdown."""
    from tests.models.checks import CHECKS, Subject
    from tests.models.zoo import ZOO

    lines = [
        f"| architecture | class of transformers | {' | '.join(CHECKS)} | notes |",
        "|" + " --- |" * (len(CHECKS) + 3),
    ]
    for architecture in ZOO:
        subject = Subject(architecture)
        results = " | ".join(result(check, subject) for check in CHECKS.values())
        lines.append(f"| {architecture.name} | `{architecture.model}` | {results} | {architecture.notes} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.WARNING)
    page = PAGE.read_text(encoding="utf-8")
    before, _, after = page.split(MARK)
    new = f"{before}{MARK}\n{table()}\n{MARK}{after}"
    if check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
