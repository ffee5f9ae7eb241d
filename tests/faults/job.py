"""A training run that is killed, stopped, starved and lied to: a program (`python -m tests.faults.job JOB.json`).

A job is JSON: `case` (full, lora, seq2seq), `run_dir`, `report` (a file), and optionally `orders` (see events.py), `steps`,
`save_every`, `settings` of `PPOConfig`, `train` (arguments of `PPOTrainer.train`), `reward` (a function in rewards.py),
`guard` (its Guard), `budget` (its ErrorBudget), `spike` (SpikeSettings), `dropout`. When the run has ended, the report says every bit of where it is.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults import rewards
from tests.faults.events import EVALUATION, Events, install
from tests.training.runs import build, fingerprint
from trl.files import sha256_of
from trl.rewards import ErrorBudget, FunctionReward, Guard, as_reward
from trl.runs.spikes import SpikeSettings
from trl.trackers import read_completions, read_metrics, without_times
from trl.training.processes import share_bytes

PROMPTS = [f"w{20 + i} " + " ".join(f"w{30 + (3 * i + j) % 25}" for j in range(1 + i % 3)) for i in range(10)]
HELD_OUT = [f"w{EVALUATION} w{5 + i}" for i in range(3)]
BATCH, STEPS = 4, 6
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+Z ")


def main(job: dict[str, Any]) -> None:
    """Trains, and reports."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(job["run_dir"])
    events = Events(job.get("orders", ()))
    install(events, folder)
    saved = any(folder.glob("checkpoints/step-*"))
    # What a checkpoint does not hold would show: a resumed run begins with another value head,
    # adapter and mode, and other generators.
    trainer = build(job["case"], chance=7 if saved else 0, **job.get("settings", {}))
    for kind in (random.seed, np.random.seed, torch.manual_seed):
        kind(1000 if saved else 1)
    trainer.model.train(job.get("dropout", True) != saved)
    result = trainer.train(
        PROMPTS,
        **{
            "reward": _reward(job, events),
            "steps": job.get("steps", STEPS),
            "run_dir": folder,
            "resume": "auto",
            "generation": {"max_new_tokens": 5, "do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
            "eval_prompts": HELD_OUT,
            "eval_every": 2,
            "save_every": job.get("save_every", 2),
            "progress": False,
            **job.get("train", {}),
            **({"spike": SpikeSettings(**job["spike"])} if "spike" in job else {}),
        },
    )
    # Of all processes: the generators of each belong to the bits, and an event is to be reached by any of them.
    bits = fingerprint(trainer)
    counts = [json.loads(part) for part in share_bytes(trainer.accelerator, json.dumps(events.counts).encode())]
    if trainer.accelerator.is_main_process:
        least = {kind: min(count.get(kind, number) for count in counts) for kind, number in events.counts.items()}
        report = {"steps": result.steps, "counts": least, "bits": bits, **what_was_recorded(folder)}
        Path(job["report"]).write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        os._exit(0)  # gloo's threads sometimes keep an interpreter from ending


def what_was_recorded(folder: Path) -> dict[str, Any]:
    """Every record of the run that must not depend on whether it was interrupted."""
    rows = [without_times(row) for row in read_metrics(folder)]
    samples = [read_completions(folder, row["step"]) for row in rows]
    events = (folder / "events.log").read_text().splitlines()
    return {
        "torn events": [line for line in events if len(_TIME.findall(line)) != 1],
        "unfinished": sorted(path.name for path in folder.rglob(".staging-*")),
        "rows": rows,
        "samples": [[{k: v for k, v in sample.items() if k != "time/reward"} for sample in some] for some in samples],
        "files": sorted(path.name for path in (folder / "completions").iterdir()),
        "model": {path.name: sha256_of(path) for path in (folder / "model").iterdir()},
        "summary": without_times(json.loads((folder / "summary.json").read_text())),
        "final": sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")),
    }


def _reward(job: dict[str, Any], events: Events) -> Any:
    function = getattr(rewards, job.get("reward", "words"))
    if "guard" in job:
        budget = ErrorBudget(**job["budget"]) if "budget" in job else None
        return as_reward(FunctionReward(function, "words", Guard(**job["guard"])), budget=budget)

    def words(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        for prompt in prompts:
            events("evaluation" if prompt.startswith(f"w{EVALUATION} ") else "scoring")
        return function(prompts, completions)

    return words


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
