"""The job nearest to job.py's in TRL 1, which has no PPO: GRPO on the same model, prompts, lengths and number of updates.

    python bench/grpo_job.py --model FOLDER --reviews FILE.jsonl [--autocast] [--cycles 4] ...

Prints what job.py prints. It does less work than PPO: no value head is trained, and each prompt is answered four times, so
there are a quarter as many prompts. A cycle is one round of sampling, scoring by policy and reference, and `--epochs` passes
over its minibatches; what is not sampling counts as `step`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from job import queries_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl
from trl import GRPOConfig, GRPOTrainer

ANSWERS = 4  # per prompt


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Notes when each cycle began, and the seconds and tokens of its sampling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began: list[float] = []
        self.sampling: list[tuple[float, int]] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.began.append(time.perf_counter())
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = super()._generate_single_turn(*args, **kwargs)
        self.sampling.append((time.perf_counter() - started, sum(len(tokens) for tokens in found[0])))
        return found


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The score of job.py."""
    return [len(set(tokens)) / max(1, len(tokens)) for tokens in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--reviews", type=Path, required=True)
    add("--autocast", action="store_true", help="compute in bfloat16, with float32 weights")
    for name, usual in (("batch", 16), ("mini", 4), ("epochs", 4), ("query", 8), ("new", 48), ("cycles", 4)):
        add(f"--{name}", type=int, default=usual)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    queries = queries_of(tokenizer, args.reviews, args.query, args.cycles * args.batch)
    minibatches = args.batch // args.mini
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=args.mini, gradient_accumulation_steps=1,
            steps_per_generation=minibatches, num_iterations=args.epochs, num_generations=ANSWERS,
            max_completion_length=args.new, generation_kwargs={"min_new_tokens": args.new}, temperature=1.0, top_k=0,
            beta=0.05, learning_rate=1e-5, max_steps=args.cycles * minibatches * args.epochs, bf16=args.autocast,
            gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = TimedTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False),
            reward_funcs=variety,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(query) for query in queries]}),
            processing_class=tokenizer,
        )
        trainer.train()
    marks = [*trainer.began, time.perf_counter()]
    for cycle, (began, ended, sampling) in enumerate(zip(marks, marks[1:], trainer.sampling, strict=False)):
        row = {
            "trl": trl.__version__,
            "cycle": cycle,
            "sample_s": sampling[0],
            "step_s": ended - began - sampling[0],
            "samples_per_s": args.batch / (ended - began),
            "sample_tokens": sampling[1],
            "tokens_per_s": sampling[1] / sampling[0],
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
