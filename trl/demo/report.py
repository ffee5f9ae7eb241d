"""Runs the demo, reports progress and results on the terminal, and writes the output files."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from transformers.utils import logging as transformers_logging

from trl.demo.outcome import DemoResult, DemoSettings
from trl.demo.run import Demo
from trl.demo.terminal import comparison, verdict
from trl.report import write_report
from trl.trackers import read_metrics


def run_and_report(settings: DemoSettings, out: Path, *, stream: TextIO, started: float) -> bool:
    """Trains, shows the results on `stream`, and writes the files.

    Args:
        settings: settings of the run.
        out: an empty folder, which becomes the run directory.
        stream: terminal or file for the results; progress goes to standard error.
        started: `time.perf_counter()` at program start.

    Returns:
        Whether the run was interrupted; partial results are written in that case.
    """

    def print_line(text: str) -> None:
        stream.write(text + "\n")
        stream.flush()

    result = DemoResult(settings=settings)
    transformers_logging.disable_progress_bar()
    print_line(
        f"PPO for positive film reviews: {settings.steps} steps of {settings.batch_size} reviews, seed {settings.seed}"
    )
    try:
        demo = Demo(settings)
        result.before = demo.evaluate()
        demo.train(out)
        result.after = demo.evaluate()
    except KeyboardInterrupt:
        # A second Ctrl-C ends the program at once.
        result.interrupted = True
    result.steps = len(read_metrics(out))
    result.seconds = time.perf_counter() - started
    files = write(result, out)
    if result.interrupted:
        print_line(f"interrupted after {result.steps} of {settings.steps} steps")
    else:
        assert result.before is not None and result.after is not None
        width = min(100, shutil.get_terminal_size((100, 24)).columns)
        print_line("\n" + comparison(result.before, result.after, width) + "\n" + verdict(result))
    print_line(f"Finished in {result.seconds:.0f} s. Files written:")
    for path in files:
        print_line(f"  {path}")
    if not result.interrupted:
        print_line(f'Next:\n  trl report {out} --open\n  trl generate {out} --prompt "This film"')
    return result.interrupted


def summary(result: DemoResult) -> dict[str, Any]:
    """Metrics of the held-out prompts and settings, for demo.json."""
    outcome: dict[str, Any] = {
        "seed": result.settings.seed,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "interrupted": result.interrupted,
    }
    for name, held_out in (("before", result.before), ("after", result.after)):
        if held_out is not None:
            outcome[name] = {k: v for k, v in asdict(held_out).items() if k != "reviews"}
    return outcome | {"settings": asdict(result.settings)}


def write(result: DemoResult, out: Path) -> list[Path]:
    """Writes the demo's own files and the report, even of an interrupted run, and returns the paths of all files."""
    texts: Mapping[str, str] = {
        "demo.json": json.dumps(summary(result), indent=2) + "\n",
        "reviews.json": json.dumps(
            {
                name: [asdict(review) for review in held_out.reviews]
                for name, held_out in (("before", result.before), ("after", result.after))
                if held_out is not None
            },
            indent=1,
        )
        + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    paths = [out / name for name in (*texts, "metrics.jsonl", "completions", "model")]
    if (out / "events.log").exists():
        paths.insert(0, write_report(out))
    return [path for path in paths if path.exists()]
