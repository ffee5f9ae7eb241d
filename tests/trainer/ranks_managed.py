"""Run by test_train_two_processes.py under torchrun: managed runs of two processes. Prints a JSON line per rank."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.trainer.managed import GENERATION, HELD_OUT, PROMPTS, fresh, recorded, run, words
from trl import TrainCallback
from trl.doctor import examine
from trl.state.tensorfile import tensor_bytes


class StopFromRank1(TrainCallback):
    def on_step(self, trainer: Any, step: int, row: Any) -> bool:
        return trainer.accelerator.process_index == 1 and step == 2


def digest(trainer: Any) -> str:
    return hashlib.sha256(b"".join(bytes(tensor_bytes(p)) for p in trainer.model.parameters())).hexdigest()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])

    def picky(prompts: Any, completions: Any) -> Any:  # rank 1 has no score in its first batch
        calls.append(1)
        return [None if rank == 1 and len(calls) == 1 else 1.0] * len(prompts)

    def broken(prompts: Any, completions: Any) -> Any:
        if rank == 1:
            raise KeyError("on rank 1 alone")
        return words(prompts, completions)

    calls: list[int] = []
    report: dict[str, Any] = {"rank": rank}
    trainer = fresh()
    result = run(
        trainer, run_dir=folder / "run", steps=5, eval_prompts=HELD_OUT[:1], eval_every=2, callbacks=[StopFromRank1()]
    )
    report["stopped"] = [result.steps, result.episodes, result.reason, digest(trainer)]
    trainer = fresh()
    result = run(trainer, run_dir=folder / "run", steps=5, eval_prompts=HELD_OUT[:1], eval_every=2, resume="auto")
    report["resumed"] = [result.steps, digest(trainer), str(result.last)]
    trainer = fresh()
    run(trainer, run_dir=folder / "whole", steps=5, eval_prompts=HELD_OUT[:1], eval_every=2)
    report["whole"] = digest(trainer)
    trainer = fresh()
    run(trainer, reward=picky, run_dir=folder / "picky", steps=2)
    report["picky"] = [digest(trainer), trainer.score_moments.count]
    try:
        run(reward=broken, run_dir=folder / "broken", steps=2)
    except RuntimeError as error:
        report["broken"] = str(error)
    try:
        run(run_dir=folder / "run", steps=5)
    except ValueError as error:
        report["again"] = str(error)
    trainer = fresh("plain sgd", batch_size=2)
    before = digest(trainer), torch.get_rng_state().tolist()
    compared = trainer.evaluate(PROMPTS[:7], words, generation=GENERATION)
    found = [finding.code for finding in examine(trainer, PROMPTS, words, GENERATION)]
    assert (digest(trainer), torch.get_rng_state().tolist()) == before
    report["evaluated"] = compared.to_dict()
    trainer = fresh("full", learning_rate=1.0)
    trainer.optimizer.param_groups[0]["lr"] = 1.0
    try:
        run(trainer, run_dir=folder / "unfit", steps=2)
    except ValueError as error:
        report["unfit"] = f"{type(error).__name__}: {error}"
    report["found"] = found
    run(fresh(), prompts=["w40 w50"] * 10, run_dir=folder / "one_prompt", steps=1)
    if rank == 0:
        report["drawn"] = [sample["completion"] for sample in recorded(folder / "one_prompt")[1][0]]
        rows, samples = recorded(folder / "run")
        report["same"] = (rows, samples) == recorded(folder / "whole")
        report["taken"] = [[sample["prompt_id"] for sample in some] for some in samples]
        report["excluded"] = [row["reward/excluded"] for row in recorded(folder / "picky")[0]]
        assert len(PROMPTS) == 10
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes keep an interpreter from ending


if __name__ == "__main__":
    main()
