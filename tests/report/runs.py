"""Run directories made up for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl.trackers import CompletionRecord, RunDirectory
from trl.trackers.records import write_records

CONFIG = {
    "ppo": {"adap_kl_ctrl": True, "target": 6.0, "cliprange": 0.2, "max_grad_norm": 1.0, "target_kl": 0.1, "seed": 0},
    "algorithm": {"name": "ppo"},
    "train": {"steps": 20},
}


def row(step: int, steps: int = 20, **changes: float) -> dict[str, Any]:
    """Metrics of a healthy step."""
    done = step / steps
    score = 2 * done
    return {
        "score/mean": score,
        "score/std": 0.5,
        "score/p05": score - 0.8,
        "score/p25": score - 0.3,
        "score/median": score + 0.02,
        "score/p75": score + 0.3,
        "score/p95": score + 0.8,
        "objective/kl": 6 * done,
        "objective/kl_coef": 0.2 - 0.1 * done,
        "ppo/policy/entropy": 3.0 - done,
        "ppo/policy/clipfrac": 0.1,
        "ppo/policy/mean_ratio": 1.01,
        "ppo/policy/approxkl": 0.01,
        "ppo/loss/value": 0.5 - 0.3 * done,
        "ppo/val/var_explained": 0.5 * done,
        "ppo/grad_norm": 0.9,
        "ppo/learning_rate": 1e-5,
        "tokens/responses_len_mean": 40.0,
        "tokens/truncated": 0.5,
        "reward/words/mean": score,
        "reward/errors": 0.0,
        "reward/excluded": 0.0,
        "time/sample": 0.7,
        "time/score": 0.1,
        "time/learn": 1.1,
        "time/eval": 0.0,
        "time/step": 1.9,
        "time/tokens_per_second": 900.0,
        "memory/peak_mb": 600.0 + done,
    } | changes


def record(
    number: int, text: str, *, prompt: str = "the film", tokens: bool = False, **changes: Any
) -> CompletionRecord:
    pieces = [text[i : i + 5] for i in range(0, min(len(text), 50), 5)]
    numbers = [(-1.0) ** i * 0.1 * i for i in range(len(pieces))]
    fields: dict[str, Any] = {
        "prompt_id": f"p{number}",
        "prompt": prompt,
        "completion": text,
        "rewards": {"words": 0.5},
        "score": 0.1 * number,
        "advantage": 0.01 * number,
        "kl": 1.5,
        "length": 12,
        "finish_reason": "stop",
        "reward_seconds": 0.01,
        "tokens": dict.fromkeys(("reward", "kl", "advantage", "value"), numbers) | {"text": pieces} if tokens else None,
    }
    return CompletionRecord(**fields | changes)


def make_run(
    path: Path,
    steps: int = 20,
    texts: Sequence[str] = ("a fine film", "a poor one"),
    *,
    rows: Sequence[dict[str, Any]] | None = None,
    config: Any = CONFIG,
    summary: dict[str, Any] | None = None,
    findings: Sequence[dict[str, Any]] = (),
    events: Sequence[str] = (),
) -> Path:
    """A run of `steps` steps; every text is a completion of the first and the last of them. Finished unless `summary` is {}."""
    rows = [row(step, steps) for step in range(1, steps + 1)] if rows is None else rows
    with RunDirectory.create(path) as run:
        run.write_config(config)
        for step in {1, steps} if steps else set():
            samples = [record(i, text, tokens=i % 3 == 0) for i, text in enumerate(texts)]
            run.log_completions(samples, step)
        for step, values in enumerate(rows, start=1):
            run.log(values, step)
        for event in events:
            run.event(event)
        if summary is None:
            summary = {"reason": "steps", "steps": steps, "target": steps}
        if summary:
            run.write_summary(summary)
    lines = [json.dumps(finding) + "\n" for finding in findings]
    if lines:
        (path / "findings.jsonl").write_text("".join(lines))
    return path


WORDS = "the film was a very good bad long short story about people who see it again and never forget".split()


def make_long_run(path: Path, steps: int = 5000, samples: int = 64, words: int = 60) -> Path:
    """A run of the size that the report must manage: `samples` completions of `words` words a step, four with tokens."""
    draw = random.Random(0)
    with RunDirectory.create(path) as run:
        run.write_config(CONFIG | {"train": {"steps": steps}})
    lines = []
    for step in range(1, steps + 1):
        noise = {key: value * draw.uniform(0.9, 1.1) for key, value in row(step, steps).items()}
        spare = {f"ppo/spare/{i}": draw.random() for i in range(30)}  # real rows have about 70 keys
        lines.append(json.dumps({"step": step} | noise | spare) + "\n")
        records = []
        for i in range(samples):
            text = " ".join(draw.choices(WORDS, k=words))
            prompt = 64 * (step % 4) + i
            records.append(
                record(prompt, text, prompt=f"prompt {prompt}", tokens=i < 4, score=math.sin(i) + step / steps)
            )
        write_records(path / "completions", step, records)
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "summary.json").write_text(json.dumps({"reason": "steps", "steps": steps, "target": steps}))
    return path
