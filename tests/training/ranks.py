"""Run by test_two_processes.py under torchrun, or alone: prints what two steps on a split batch did."""

from __future__ import annotations

import json
import os
import sys
import warnings

import torch

from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

SAMPLES = 8
KEYS = ("objective/kl", "objective/kl_coef", "ppo/loss/total", "ppo/grad_norm", "ppo/returns/var", "ppo/policy/entropy")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    torch.manual_seed(0)
    model.v_head.summary.weight.data.normal_(0, 0.1)
    random = torch.Generator().manual_seed(5)
    queries = [torch.randint(3, 61, (2 + i % 3,), generator=random) for i in range(SAMPLES)]
    responses = [torch.randint(3, 61, (3 + i % 5,), generator=random) for i in range(SAMPLES)]
    scores = list(torch.randn(SAMPLES, generator=random))
    share = SAMPLES // world
    config = PPOConfig(
        batch_size=share,
        mini_batch_size=2,
        gradient_accumulation_steps=share // 2,
        ppo_epochs=2,
        max_grad_norm=0.5,
        use_score_scaling=True,
    )
    # Plain SGD: Adam's first steps would hide a gradient that is off by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer)
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(2):
        stats = trainer.step(queries[mine], responses[mine], scores[mine])
    report = {key: stats[key] for key in KEYS}
    report["weights"] = sum(p.double().abs().sum().item() for p in model.parameters())
    report["moments"] = [trainer.score_moments.mean, trainer.score_moments.std]
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    if world > 1:
        torch.distributed.destroy_process_group()
        os._exit(0)  # gloo's threads sometimes keep an interpreter from ending


if __name__ == "__main__":
    main()
