"""The demo's PPO job through the step interface: runs unchanged on this library and on TRL 0.11.

    python bench/quality_job.py --policy FOLDER --classifier FOLDER --prompts FILE.json --seed 0 [--steps 80] ...

Prints a JSON line with the settings, and one per step: seconds from the end of loading to when its reviews had been scored,
reviews so far, their mean P(POSITIVE) and KL. Settings that the library's PPOConfig does not know are left out, and named.
Ends once `--in-a-row` batches one after the other were above `--target`, or at `--steps` or `--seconds`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of old libraries under a new torch

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

import trl  # noqa: E402
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model  # noqa: E402

HELD_OUT = 64  # prompts that the demo never trains on
NEW_TOKENS, SCORE_CLIP, SHARED_LAYERS = 48, 3.5, 2
# As in trl/demo/outcome.py; a test holds the two together.
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "batch_size": 64, "mini_batch_size": 16, "ppo_epochs": 2, "init_kl_coef": 0.05, "target": 13.0,
    "horizon": 400.0, "vf_coef": 0.2, "cliprange_value": 2.0, "lam": 0.95, "max_grad_norm": 1.0, "temperature": 0.9,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--policy", required=True, help="folder of a causal language model")
    add("--classifier", required=True, help="folder of a classifier with the label POSITIVE")
    add("--prompts", type=Path, required=True, help="a JSON list of texts")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=80, help="limit")
    add("--seconds", type=float, default=math.inf, help="limit, from the end of loading")
    add("--target", type=float, default=0.9, help="mean P(POSITIVE) that batches are to be above")
    add("--new", type=int, default=NEW_TOKENS, help="most tokens of a response")
    add("--in-a-row", type=int, default=5, help="that many batches above the target end the job")
    add("--config", type=json.loads, default={}, help="JSON: settings of PPOConfig in place of the demo's")
    return parser.parse_args(arguments)


class Judge:
    """P(POSITIVE) of texts, by plain transformers."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.label = {name: int(index) for index, name in self.model.config.id2label.items()}["POSITIVE"]

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[float]:
        inputs = self.tokenizer(texts, truncation=True, max_length=256, padding=True, return_tensors="pt")
        return self.model(**inputs).logits.softmax(dim=-1)[:, self.label].tolist()


def log_odds(probability: float) -> float:
    probability = min(max(probability, 1e-6), 1 - 1e-6)
    return max(-SCORE_CLIP, min(SCORE_CLIP, math.log(probability / (1 - probability))))


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.policy, trust_remote_code=False)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.policy)
    judge = Judge(args.classifier)
    wanted = SETTINGS | {"seed": args.seed} | args.config
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    settings = {name: value for name, value in wanted.items() if name in known}
    reference = create_reference_model(model, num_shared_layers=SHARED_LAYERS)
    trainer = PPOTrainer(PPOConfig(**settings), model, reference, tokenizer)
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    random.Random(0).shuffle(prompts)
    queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts[HELD_OUT:]]
    order, pending = random.Random(args.seed), []
    print(
        json.dumps({"trl": trl.__version__, "settings": settings, "unknown": sorted(set(wanted) - known)}), flush=True
    )

    started, above = time.perf_counter(), 0
    for step in range(1, args.steps + 1):
        while len(pending) < settings["batch_size"]:
            pending += order.sample(queries, len(queries))
        some, pending = pending[: settings["batch_size"]], pending[settings["batch_size"] :]
        responses = trainer.generate(
            some, batch_size=len(some), return_prompt=False, max_new_tokens=args.new, do_sample=True,
            temperature=wanted["temperature"], top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        texts = [
            tokenizer.decode(torch.cat(pair), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for pair in zip(some, responses)  # noqa: B905
        ]
        positive = judge(texts)
        seconds = time.perf_counter() - started
        stats = trainer.step(some, list(responses), [torch.tensor(log_odds(p)) for p in positive])
        mean = sum(positive) / len(positive)
        row = {
            "step": step,
            "seconds": seconds,  # when these reviews had been scored
            "samples": step * len(some),
            "positive": mean,
            "kl": float(stats["objective/kl"]),
            "response_tokens": sum(len(r) for r in responses) / len(responses),
        }
        print(json.dumps(row), flush=True)
        above = above + 1 if mean > args.target else 0
        if above == args.in_a_row or time.perf_counter() - started > args.seconds:
            break


if __name__ == "__main__":
    main()
