"""Small PPO runs in which everything random is drawn from the generators that everyone shares.

As a program (`python -m tests.training.runs FOLDER NAME...`) it goes on with runs that were saved under FOLDER/NAME.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from trl.state.tensorfile import tensor_bytes
from trl.training.resume import capture

CASES = ("full", "full bfloat16", "lora", "lora bfloat16", "seq2seq", "plain sgd", "narrow moments")
ADAPTIVE = {
    "adap_kl_ctrl": True,
    "horizon": 40,
    "use_score_scaling": True,
    "use_score_norm": True,
    "max_grad_norm": 1.0,
}


def build(case: str, chance: int = 0, **settings: Any) -> PPOTrainer:
    """A trainer; `chance` seeds what from_pretrained draws: fresh value heads and adapters."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    base = tiny_t5(dropout_rate=0.1) if case == "seq2seq" else tiny_gpt2(**dropout)
    torch.manual_seed(chance)
    kind = AutoModelForSeq2SeqLMWithValueHead if case == "seq2seq" else AutoModelForCausalLMWithValueHead
    model = kind.from_pretrained(lora(base, lora_dropout=0.1) if case.startswith("lora") else base)
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.endswith("bfloat16"):
        settings = {"dtype": "bfloat16"} | settings
    if case == "narrow moments":
        settings = {"dtype": "bfloat16", "optimizer_state_dtype": "bfloat16"} | settings
    config = PPOConfig(
        **({"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-2} | ADAPTIVE | settings)
    )
    optimizer = scheduler = None
    if case.startswith("full"):
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    elif case == "plain sgd":
        optimizer = torch.optim.SGD(trained, lr=1e-2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3])
    return PPOTrainer(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler)


def begin(case: str, **settings: Any) -> PPOTrainer:
    """A trainer with dropout on, and generators at a place that has nothing to do with its seed."""
    trainer = build(case, **settings)
    trainer.model.train()
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    return trainer


def advance(trainer: PPOTrainer, steps: int) -> list[dict[str, float]]:
    """Samples, scores and learns; the statistics that are numbers, without clocks and memory."""
    rows = []
    for _ in range(steps):
        queries = [torch.tensor(random.choices(range(3, 61), k=2 + i % 3)) for i in range(4)]
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True, top_k=0)
        scores = [torch.tensor(float(r.float().mean() / 30 + np.random.randn())) for r in responses]
        with warnings.catch_warnings():  # a fixed seed can draw tokens that have become rarer
            warnings.filterwarnings("ignore", "objective/kl is")
            stats = trainer.step(queries, list(responses), scores)
        rows.append(
            {k: float(v) for k, v in stats.items() if "time/" not in k and "memory/" not in k and np.ndim(v) == 0}
        )
    return rows


def fingerprint(trainer: PPOTrainer) -> dict[str, Any]:
    """Every bit that the rest of the run depends on, and the weights whatever they are stored as."""
    tensors, state = capture(trainer)
    digests = {
        f"{file}/{name}": hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        for file, group in tensors.items()
        for name, tensor in group.items()
    }
    weights = {name: hashlib.sha256(tensor_bytes(p)).hexdigest() for name, p in trainer.model.named_parameters()}
    return json.loads(json.dumps({"tensors": digests, "weights": weights, "state": state}))


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    for i, case in enumerate(cases):
        trainer = build(case, chance=100 + i)
        trainer.load_checkpoint(Path(folder) / case)
        print(json.dumps({"rows": advance(trainer, 2), "end": fingerprint(trainer)}))


if __name__ == "__main__":
    main()
