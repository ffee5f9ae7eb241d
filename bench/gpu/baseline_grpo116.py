"""TRL 1.16's GRPO on the job of bench/gpu/bench.py, the nearest that TRL 1 has to PPO: 16 prompts, four answers each, one reward, four passes.

    python baseline_grpo116.py qwen05 | llama1b  [--cycles 1]

bfloat16 autocast on float32 weights; sampling by transformers' generate (vLLM's wheels are too large to carry). It trains no value
head. The first cycle warms up. Run by baseline_grpo116.sh.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from common import DEVICE, JOB, TINY, plain_model, sync, tokenizer  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import trl  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

ANSWERS = 4


class Timed(GRPOTrainer):
    began: ClassVar[list[float]] = []
    sampling: ClassVar[list[tuple[float, int]]] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        sync()
        self.began.append(time.perf_counter())
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        sync()
        started = time.perf_counter()
        found = super()._generate_single_turn(*args, **kwargs)
        sync()
        self.sampling.append((time.perf_counter() - started, sum(len(tokens) for tokens in found[0])))
        return found


def variety(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(set(tokens)) / max(1, len(tokens)) for tokens in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=("qwen05", "llama1b"))
    parser.add_argument("--cycles", type=int, default=1)
    args = parser.parse_args()
    shape = {"qwen05": "tiny-qwen", "llama1b": "tiny-llama"}[args.shape] if TINY else args.shape
    words = 512
    name = tokenizer(words)
    prompts = [
        " ".join(f"w{3 + (i * 31 + j * 7) % (words - 3)}" for j in range(JOB["prompt"]))
        for i in range((args.cycles + 1) * JOB["batch"])
    ]
    minibatches = JOB["batch"] // JOB["mini"]
    with tempfile.TemporaryDirectory() as folder:
        home = str(Path(folder) / "model")  # the reference model is loaded from where the policy came from
        plain_model(shape).save_pretrained(home)
        model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, trust_remote_code=False)
        settings = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=JOB["mini"], gradient_accumulation_steps=1, steps_per_generation=minibatches,
            num_iterations=JOB["epochs"], num_generations=ANSWERS, max_completion_length=JOB["new"],
            generation_kwargs={"min_new_tokens": JOB["new"]}, temperature=1.0, top_k=0, beta=0.05, learning_rate=1e-6,
            max_steps=(args.cycles + 1) * minibatches * JOB["epochs"], bf16=True, gradient_checkpointing=False, use_cpu=DEVICE == "cpu",
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Timed(
            model=model,
            reward_funcs=variety,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=name,
        )
        trainer.train()
    sync()
    marks = [*Timed.began, time.perf_counter()]
    rows = []
    for cycle, (began, ended, (seconds, tokens)) in enumerate(zip(marks, marks[1:], Timed.sampling, strict=False)):
        rows.append(dict(trl=trl.__version__, shape=args.shape, cycle="warm" if cycle == 0 else cycle, sampling=seconds, tokens=tokens,
                         tokens_per_s=tokens / seconds, step=ended - began - seconds,
                         peak_gb=torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else None))  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    path = Path(os.environ.get("OUT", ".")) / "baseline.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps(before + rows, indent=1))


if __name__ == "__main__":
    main()
