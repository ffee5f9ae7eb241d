"""Managed runs of the tiny models, quick enough to be made by the dozen."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.training.runs import build, fingerprint
from trl import PPOTrainer, TrainResult
from trl.trackers import read_completions, read_metrics, without_times

# No word that begins with w0 to w3: the tokenizer would find its special tokens in it.
PROMPTS = [f"w{40 + i} " + " ".join(f"w{50 + (3 * i + j) % 10}" for j in range(1 + i % 3)) for i in range(10)]
HELD_OUT = ["w50 w51", "w52", "w53 w54 w55"]
GENERATION = {"max_new_tokens": 5}


def words(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A number between 0 and 1 that every word changes."""
    digests = [hashlib.sha256(f"{p}|{c}".encode()).digest()[0] for p, c in zip(prompts, completions)]
    return [byte / 255 for byte in digests]


def run(trainer: PPOTrainer | None = None, prompts: Any = PROMPTS, **arguments: Any) -> TrainResult:
    """`train` of a fresh trainer (dropout on, adaptive KL, running moments) or of this one."""
    if trainer is None:
        trainer = fresh()
    defaults: dict[str, Any] = {"reward": words, "generation": GENERATION, "progress": False}
    if "episodes" not in arguments:
        defaults["steps"] = 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "objective/kl is")  # a seed can draw tokens that have become rarer
        return trainer.train(prompts, **(defaults | arguments))


def fresh(case: str = "full", **settings: Any) -> PPOTrainer:
    trainer = build(case, **settings)
    trainer.model.train()
    return trainer


def recorded(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows without times, and samples without theirs."""
    rows = [without_times(row) for row in read_metrics(folder)]
    samples = [read_completions(folder, row["step"]) for row in rows]
    return rows, [[{k: v for k, v in one.items() if k != "time/reward"} for one in some] for some in samples]


def events(folder: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in (folder / "events.log").read_text().splitlines()]


def bits(trainer: PPOTrainer) -> dict[str, Any]:
    return fingerprint(trainer)
