"""A run of DPO, KTO or a reward model as a program: `python -m tests.trainer.offline.preference_job '{"stage": "dpo", ...}'`.

Prints the weights' sum and digest and the last row of the log, from each process.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.helpers import tiny_llama, tiny_tokenizer
from tests.trainer.offline.preferences import ROWS, settings
from tests.trainer.offline.test_reward_trainer import classifier
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer


class Killer(TrainerCallback):
    """SIGKILL after an optimizer step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    job = json.loads(sys.argv[1])
    rows = [dict(row) for row in [*ROWS, *ROWS[::-1], *ROWS[:2]]]
    options = {
        "learning_rate": 1e-2,
        "per_device_train_batch_size": job["batch"],
        "max_steps": 4,
        "eval_strategy": "no",
    }
    options |= {"save_strategy": "steps", "save_steps": 1} if job.get("save") else {}
    if job.get("run"):
        options |= {"save_steps": 2, "logging_steps": 3}
    common = {"train_dataset": rows, "processing_class": tiny_tokenizer()}
    if job.get("kill_at"):
        common["callbacks"] = [Killer(job["kill_at"])]
    folder = Path(job["out"])
    trainer: Any
    if job["stage"] == "dpo":
        trainer = DPOTrainer(tiny_llama(), args=settings(DPOConfig, folder, **options), **common)
    elif job["stage"] == "kto":
        common["train_dataset"] = [
            {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[i % 2]], "label": i % 2 == 0}
            for i, row in enumerate(rows)
        ]
        trainer = KTOTrainer(
            tiny_llama(), args=settings(KTOConfig, folder, loss_type=job["loss_type"], **options), **common
        )
    else:
        trainer = RewardTrainer(classifier(), args=settings(RewardConfig, folder, **options), **common)
    if job.get("run"):
        trainer.train(run_dir=folder / "run", resume_from_checkpoint="auto")
    else:
        trainer.train(resume_from_checkpoint=bool(job.get("resume")))
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    print(json.dumps({"digest": digest, "sum": float(weights.double().abs().sum()), **row}), flush=True)


if __name__ == "__main__":
    main()
