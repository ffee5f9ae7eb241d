"""Run by test_two_processes_resumed.py under torchrun: checkpoints and troubles of data-parallel processes.

Prints one JSON line per rank.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.training.runs import advance, begin, build, fingerprint
from trl.algorithms.ppo import ppo_loss
from trl.state.checkpoints import CheckpointError
from trl.types import Experience, Loss

# PPO on two ranks, each with its own queries, dropout and noise in the scores.


def own_generators(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    trainer = begin("full")
    own_generators(rank)
    advance(trainer, 1)
    trainer.save_checkpoint(folder)
    rows, end = advance(trainer, 2), fingerprint(trainer)
    other = build("full", chance=7)
    loaded = other.load_checkpoint(folder)
    assert loaded is not None
    generators = loaded.state["generators"]
    same = advance(other, 2) == rows and fingerprint(other) == end
    return {"same": same, "step": loaded.step, "own generators": generators[0] != generators[1], "end": end["weights"]}


def failed_save(folder: Path, rank: int) -> str:
    """The main process cannot write; the other must hear of it and not wait."""
    folder.write_text("a file where a folder should be") if rank == 0 else None
    trainer = begin("full")
    try:
        trainer.save_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return "no error"


def troubles(rank: int, accumulation: int) -> dict[str, Any]:
    """Rank 1 runs out of memory with two rows, and later has a loss that is none."""
    calls = iter(range(1000))

    def troubled(policy: Any, settings: Any) -> Any:
        loss = ppo_loss(policy, settings)

        def of(experience: Experience) -> Loss:
            found = loss(experience)  # the forward pass, in which processes meet as well
            if rank == 1 and len(experience) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if rank == 1 and next(calls) == 5:
                return Loss(objective=found.objective * float("nan"), metrics=found.metrics, arrays=found.arrays)
            return found

        return of

    trainer = begin("full", gradient_accumulation_steps=accumulation)
    own_generators(rank)
    rows = []
    with patch("trl.algorithms.ppo.ppo_loss", troubled):
        rows += advance(trainer, 1)
    rows += advance(trainer, 1)
    return {
        "microbatch": trainer.guards.largest_microbatch,
        "skipped": [row["ppo/skipped_updates"] for row in rows],
        "weights": fingerprint(trainer)["weights"],
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    report = {
        "rank": rank,
        "resumed": resumed(folder / "run", rank),
        "failed": failed_save(folder / "file", rank),
        "troubles": [troubles(rank, accumulation) for accumulation in (1, 2)],
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes keep an interpreter from ending


if __name__ == "__main__":
    main()
