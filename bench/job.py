"""One PPO job through the step interface: runs unchanged on this library and on TRL 0.4 to 0.11.

    python bench/job.py --model FOLDER --reviews FILE.jsonl [--weights float32 | bfloat16] [--cycles 3] ...

Prints a JSON line per cycle (seconds of sampling and of `step`) and the peak memory of the process last. The score is a
cheap function of the tokens, so that the library alone is timed. The first cycle warms up and is to be left out.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of old libraries under a new torch

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import trl  # noqa: E402
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of a causal language model")
    add("--reviews", type=Path, required=True, help="a .jsonl file with a `text` per line")
    add("--weights", choices=("float32", "bfloat16"), default="float32")
    add("--config", default="{}", help="JSON: more settings of PPOConfig")
    for name, usual in (("batch", 16), ("mini", 4), ("epochs", 4), ("query", 8), ("new", 48), ("cycles", 4)):
        add(f"--{name}", type=int, default=usual)
    add(
        "--ragged",
        type=int,
        default=0,
        metavar="N",
        help="responses of N to --new tokens, drawn for each; 0: all of --new",
    )
    return parser.parse_args(arguments)


def queries_of(tokenizer: Any, path: Path, length: int, count: int) -> list[torch.Tensor]:
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4000), strict=False)]
    random.Random(0).shuffle(texts)
    found: list[torch.Tensor] = []
    for text in texts:
        tokens = tokenizer(text[:400], return_tensors="pt").input_ids[0][:length]
        if len(tokens) == length:
            found.append(tokens)
        if len(found) == count:
            return found
    raise SystemExit(f"{path} has {len(found)} reviews of {length} tokens; {count} are needed")


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model, torch_dtype=getattr(torch, args.weights))
    settings = dict(batch_size=args.batch, mini_batch_size=args.mini, ppo_epochs=args.epochs, learning_rate=1e-5)
    config = PPOConfig(**settings, **json.loads(args.config))
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    queries = queries_of(tokenizer, args.reviews, args.query, args.cycles * args.batch)
    lengths = random.Random(1)
    for cycle in range(args.cycles):
        some = queries[cycle * args.batch : (cycle + 1) * args.batch]
        started = time.perf_counter()
        responses = trainer.generate(
            some, return_prompt=False, batch_size=args.batch, max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        sampled = time.perf_counter()
        if args.ragged:
            responses = [r[: lengths.randint(args.ragged, args.new)] for r in responses]
        scores = [torch.tensor(len(set(r.tolist())) / len(r)) for r in responses]
        stats = trainer.step(some, list(responses), scores)
        done = time.perf_counter()
        row = {
            "trl": trl.__version__,
            "cycle": cycle,
            "sample_s": sampled - started,
            "step_s": done - sampled,
            "samples_per_s": args.batch / (done - started),
            "kl": float(stats["objective/kl"]),
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
