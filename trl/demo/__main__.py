"""Command line of the demo, `python -m trl.demo`. Parses the arguments before any heavy import."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trl import startup
from trl.demo.outcome import TASK, DemoSettings
from trl.files import remove

INTERRUPTED = 130  # exit code after Ctrl-C, as shells report it
# Files and folders of a run of the demo, which the next one in the same folder replaces.
FILES = (
    "report.html", "metrics.jsonl", "completions", "checkpoints", "model", "dumps", "events.log", "findings.jsonl",
    "summary.json", "config.resolved.yaml", "environment.json", "reviews.json", ".lock", "demo.json",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    argument_parser = argparse.ArgumentParser(
        prog="python -m trl.demo",
        description="PPO for positive film reviews with the package's two tiny models: no download, no GPU.",
    )
    defaults, add_argument = DemoSettings(), argument_parser.add_argument
    add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="random seed (default: %(default)s)")
    add_argument("--steps", type=int, default=defaults.steps, metavar="N", help="PPO steps (default: %(default)s)")
    add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="reviews per step (default: %(default)s)",
    )
    add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="output folder (default: %(default)s)"
    )
    return argument_parser


def prepare(folder: Path) -> None:
    """Creates the output folder, or removes the files of an earlier run of the demo from it.

    Raises:
        OSError: if the folder is not writable, or holds something else than a run of the demo.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.resolved.yaml"
    ours = config.exists() and f"task_name: {TASK}\n" in config.read_text(encoding="utf-8", errors="replace")
    others = sorted(path.name for path in folder.iterdir() if not (ours and path.name in FILES))
    if others:
        raise OSError(f"it holds {others[0]}, which is no file of an earlier demo; choose another folder")
    for name in FILES:
        if (folder / name).exists():
            remove(folder / name)
    probe = folder / FILES[-1]
    probe.write_text("", encoding="utf-8")
    probe.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns the exit code: 0, or 130 after Ctrl-C; invalid arguments exit with code 2."""
    commandline = parser()
    args = commandline.parse_args(arguments)
    started = time.perf_counter()
    try:
        settings = DemoSettings(seed=args.seed, steps=args.steps, batch_size=args.batch_size)
    except ValueError as error:
        commandline.error(str(error))
    try:
        prepare(args.out)
    except OSError as error:
        commandline.error(f"--out {args.out}: cannot be written: {error.strerror or error}")
    # Avoids requests to the Hub: nothing is downloaded. transformers reads this once, on import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    startup.set_defaults()
    if (note := startup.busy_note()) is not None:
        print(note)
    try:
        from trl.demo.report import run_and_report

        interrupted = run_and_report(settings, args.out, stream=sys.stdout, started=started)
    except KeyboardInterrupt:
        startup.end_on_next_interrupt()
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
