"""Sampling alone: the same prompts and number of tokens through this library, transformers' generate or vLLM.

    python bench/sample_job.py --engine ours | generate | vllm --model FOLDER --reviews FILE.jsonl [--batch 64] ...

Plain sampling (temperature 1, the whole vocabulary), exactly `--new` tokens a prompt, other prompts in each round. Prints a
JSON line per round and the peak memory of the process last; round 0 warms up and is to be left out. "ours" is a whole
`PPOTrainer` with its reference, as in training; the other engines hold one model, and vLLM the cache that it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from job import queries_of
from transformers import AutoTokenizer

Engine = Callable[[list[torch.Tensor]], int]  # queries [Q] each; returns the number of tokens that were sampled


def ours(args: argparse.Namespace, tokenizer: Any) -> Engine:
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model, torch_dtype=getattr(torch, args.weights))
    config = PPOConfig(batch_size=args.batch, mini_batch_size=args.batch, **json.loads(args.config))
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)

    def sample(queries: list[torch.Tensor]) -> int:
        responses = trainer.generate(
            queries, return_prompt=False, batch_size=args.batch, max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return sum(len(response) for response in responses)

    return sample


def generate(args: argparse.Namespace, tokenizer: Any) -> Engine:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.weights), trust_remote_code=False
    ).eval()

    def sample(queries: list[torch.Tensor]) -> int:
        tokens = torch.stack(queries)  # all of one length
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return (found.shape[1] - tokens.shape[1]) * len(queries)

    return sample


def vllm(args: argparse.Namespace, tokenizer: Any) -> Engine:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, whose memory is reported
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        args.model, dtype=args.weights, enforce_eager=True, enable_prefix_caching=False, max_num_seqs=args.batch,
        max_model_len=max(512, args.query + args.new), seed=0,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=args.new, min_tokens=args.new, ignore_eos=True, detokenize=False
    )

    def sample(queries: list[torch.Tensor]) -> int:
        prompts = [{"prompt_token_ids": query.tolist()} for query in queries]
        return sum(len(found.outputs[0].token_ids) for found in engine.generate(prompts, sampling, use_tqdm=False))

    return sample


ENGINES = {"ours": ours, "generate": generate, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINES), required=True)
    add("--model", required=True)
    add("--reviews", type=Path, required=True)
    add("--weights", choices=("float32", "bfloat16"), default="float32")
    add("--config", default="{}", help="JSON: more settings of PPOConfig, for ours")
    for name, usual in (("batch", 64), ("query", 8), ("new", 48), ("cycles", 6)):
        add(f"--{name}", type=int, default=usual)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    queries = queries_of(tokenizer, args.reviews, args.query, args.cycles * args.batch)
    engine = ENGINES[args.engine](args, tokenizer)
    for cycle in range(args.cycles):
        started = time.perf_counter()
        tokens = engine(queries[cycle * args.batch : (cycle + 1) * args.batch])
        seconds = time.perf_counter() - started
        if tokens != args.batch * args.new:
            raise SystemExit(f"{args.engine} sampled {tokens} tokens, not {args.batch} x {args.new}")
        row = {
            "engine": args.engine,
            "cycle": cycle,
            "sample_s": seconds,
            "sample_tokens": tokens,
            "tokens_per_s": tokens / seconds,
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
