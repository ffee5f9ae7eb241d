"""One query at a time: CPU time of `PPOTrainer.generate` over that of transformers' own `generate`, in turn.

    python bench/single_query.py [--rounds 30]

Plain sampling in float32, on the embedded model and on a GPT-2 of random weights. Prints a row of a table per case, with the
medians of the CPU time. Run it with one thread (OMP_NUM_THREADS=1): CPU time counts threads that wait.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.assets import path

QUERY = 8


def seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def compare(model: Any, tokenizer: Any, new: int, reuse: bool, rounds: int) -> tuple[float, float]:
    """Median seconds of ours and of transformers' `generate`, for `new` tokens after one query."""
    config = PPOConfig(batch_size=1, mini_batch_size=1, dtype="float32", score_while_sampling=reuse)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(copy.deepcopy(model))
    trainer = PPOTrainer(config, policy, None, tokenizer)
    query = torch.randint(3, 500, (QUERY,), generator=torch.Generator().manual_seed(0))
    asked = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": new, "eos_token_id": None}
    asked["pad_token_id"] = trainer.data_collator.pad_token_id

    def ours() -> Any:
        return trainer.generate(query, **asked)

    def theirs() -> Any:
        with torch.no_grad():
            return model.generate(query[None], attention_mask=torch.ones(1, QUERY, dtype=torch.int64), **asked)

    for run in (ours, theirs, ours, theirs):
        assert run().shape == (1, QUERY + new)
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = AutoTokenizer.from_pretrained(path("tiny-gpt2-reviews"), trust_remote_code=False)
    torch.manual_seed(0)
    sizes = {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": len(tokenizer)}
    models = {
        "embedded": AutoModelForCausalLM.from_pretrained(path("tiny-gpt2-reviews"), trust_remote_code=False).eval(),
        "GPT-2, 13M": GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval(),
    }
    print("| model | new tokens | `score_while_sampling` | ours, ms | transformers, ms | ratio |\n|" + " --- |" * 6)
    for name, model in models.items():
        for new in (8, 32):
            for reuse in (False, True):
                ours, theirs = compare(model, tokenizer, new, reuse, args.rounds)
                print(
                    f"| {name} | {new} | {reuse} | {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {ours / theirs:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
