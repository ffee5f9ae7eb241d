"""What each kernel of trl/kernels/ gains in a whole cycle: the job of job.py with one of them off, in turn in one process.

    python bench/each_kernel.py --model FOLDER --reviews FILE.jsonl [--rounds 4] [job.py's options]

Prints the least CPU time of sampling and of `step` in each line: of this process alone, so that what else runs on the
machine counts less than on the clock; run it with OMP_NUM_THREADS=1. The rounds go through the lines forwards and
backwards by turns. The allocator's settings last as long as the process: `--config '{"keep_memory": false}' --only
nothing` is a cycle without them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from contextlib import ExitStack
from importlib import import_module
from typing import Any
from unittest.mock import patch

warnings.filterwarnings("ignore")

import job  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

# Line of the table -> functions that decide whether a kernel runs.
ONE_OFF = {
    "growing cache": ["trl.kernels.kv_cache.kernels_enabled"],
    "decode attention": ["trl.kernels.decode_attention.kernels_enabled"],
    "packed weights": ["trl.kernels.packed_weights.kernels_enabled"],
    "packed attention": ["trl.models.evaluate.may_pack"],
    "projection, and with it packed attention": ["trl.models.predictions.kernels_enabled"],
    "streaming Adam": ["trl.kernels.streaming_adam.kernels_enabled"],
}
EVERYTHING = [name for names in ONE_OFF.values() for name in names] + ["trl.kernels.products.kernels_enabled"]
LINES = {"nothing": []} | ONE_OFF | {"everything": EVERYTHING}


def switched_off(names: list[str]) -> ExitStack:
    """A context in which these functions say no."""
    off = ExitStack()
    for module, _, name in (name.rpartition(".") for name in names):
        off.enter_context(patch.object(import_module(module), name, lambda *_: False))
    return off


def cycle(trainer: Any, args: argparse.Namespace, queries: list[torch.Tensor], lengths: random.Random) -> list[float]:
    """CPU seconds of sampling and of `step`."""
    start = int(trainer.is_encoder_decoder)
    started = time.process_time()
    responses = trainer.generate(
        queries, return_prompt=False, batch_size=args.batch, max_new_tokens=args.new, min_new_tokens=args.new,
        do_sample=True, top_k=0, top_p=1.0, pad_token_id=trainer.tokenizer.eos_token_id,
    )  # fmt: skip
    sampled = time.process_time()
    if args.ragged:
        responses = [r[: start + lengths.randint(args.ragged, args.new)] for r in responses]
    trainer.step(queries, responses, [torch.tensor(len(set(r.tolist())) / len(r)) for r in responses])
    return [sampled - started, time.process_time() - sampled]


def main() -> None:
    from trl import PPOConfig, PPOTrainer, create_reference_model

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES))
    own, rest = parser.parse_known_args()
    args = job.parse(rest)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokenizer.padding_side = "left"
    model = job.model_of(args, tokenizer)
    settings = dict(batch_size=args.batch, mini_batch_size=args.mini, ppo_epochs=args.epochs, learning_rate=1e-5)
    reference = None if args.lora else create_reference_model(model)
    trainer = PPOTrainer(PPOConfig(**settings, **json.loads(args.config)), model, reference, tokenizer)
    queries = job.queries_of(tokenizer, args.reviews, args.query, args.batch)
    cycle(trainer, args, queries, random.Random(1))  # warms up
    seconds: dict[str, list[list[float]]] = {line: [] for line in own.only}
    for i in range(own.rounds):
        for line in own.only if i % 2 else own.only[::-1]:
            with switched_off(LINES[line]):
                seconds[line].append(cycle(trainer, args, queries, random.Random(1)))
            print(f"{line} off: {seconds[line][-1]}", file=sys.stderr, flush=True)
    whole = {line: [min(times) for times in zip(*rows, strict=True)] for line, rows in seconds.items()}
    print("| off | sampling, s | `step`, s | the cycle is |\n| --- | --- | --- | --- |")
    first = sum(whole[own.only[0]])
    for line, (sampling, step) in whole.items():
        print(f"| {line} | {sampling:.2f} | {step:.2f} | {(sampling + step) / first:.2f}× |")


if __name__ == "__main__":
    main()
