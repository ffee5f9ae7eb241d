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

from trl.demo.figure import DARK, LIGHT, standalone
from trl.demo.outcome import DemoResult, DemoSettings
from trl.demo.page import curves_of, page
from trl.demo.run import Demo
from trl.demo.terminal import Progress, comparison, verdict


def run_and_report(
    settings: DemoSettings, out: Path, *, stream: TextIO, started: float, save_model: bool = False
) -> bool:
    """Trains, shows progress and results on `stream`, and writes the files.

    Args:
        settings: settings of the run.
        out: an existing output folder.
        stream: terminal or file for progress and results.
        started: `time.perf_counter()` at program start.
        save_model: also save the trained model to `out/model`.

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
        train(demo, result, out / "metrics.jsonl", stream)
        result.after = demo.evaluate()
        result.seconds = time.perf_counter() - started
        if save_model:
            demo.trainer.save_pretrained(out / "model")
    except KeyboardInterrupt:
        # A second Ctrl-C ends the program at once.
        result.interrupted = True
        result.seconds = time.perf_counter() - started
    files = write(result, out)
    if result.interrupted:
        print_line(f"interrupted after {len(result.rows)} of {settings.steps} steps")
    else:
        assert result.before is not None and result.after is not None
        width = min(100, shutil.get_terminal_size((100, 24)).columns)
        print_line("\n" + comparison(result.before, result.after, width) + "\n" + verdict(result))
    print_line(f"Finished in {result.seconds:.0f} s. Files written:")
    for path in [*files, *([out / "model"] if save_model and not result.interrupted else [])]:
        print_line(f"  {path}")
    return result.interrupted


def train(demo: Demo, result: DemoResult, metrics: Path, stream: TextIO) -> None:
    """Trains, writing one line per step to the file `metrics` and showing progress on `stream`."""
    settings = demo.settings
    progress = Progress(stream, settings.steps, settings.batch_size)
    with metrics.open("w", encoding="utf-8") as file:
        try:
            for row in demo.steps():
                result.rows.append(row)
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                progress.update(row)
        finally:
            progress.close()


def summary(result: DemoResult) -> dict[str, Any]:
    """Returns the metrics and settings of the run for summary.json."""
    outcome: dict[str, Any] = {
        "seed": result.settings.seed,
        "steps": len(result.rows),
        "seconds": round(result.seconds, 1),
        "interrupted": result.interrupted,
    }
    for name, held_out in (("before", result.before), ("after", result.after)):
        if held_out is not None:
            outcome[name] = {k: v for k, v in asdict(held_out).items() if k != "reviews"}
    return outcome | {"settings": asdict(result.settings)}


def write(result: DemoResult, out: Path) -> list[Path]:
    """Writes the output files, even of an interrupted run, and returns their paths."""
    curves = curves_of(result)
    texts: Mapping[str, str] = {
        "report.html": page(result),
        "curves-light.svg": standalone(curves, LIGHT),
        "curves-dark.svg": standalone(curves, DARK),
        "summary.json": json.dumps(summary(result), indent=2) + "\n",
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
    paths = [out / name for name in (*texts, "metrics.jsonl")]
    return [path for path in paths if path.exists()]
