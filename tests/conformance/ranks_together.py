"""A training script as a user would write it, which test_processes.py has a launcher start on two processes.

Every process takes its part of the same samples, of which the first half has short responses and the second half long ones.
Prints what it did as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

LENGTHS = (1, 2, 1, 3, 7, 9, 8, 5)
CLOCKS = ("time/", "ppo/time/", "memory/")


class OwnLoss(PPOTrainer):
    """An overridden `loss` that hands its arguments on, with statistics of its own making."""

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        policy, value, stats = super().loss(*args, **kwargs)
        counted = args[-1].bool()
        stats = stats | {
            "own/logprobs": args[5][counted].mean(),
            "policy/policykl": (args[0] - args[5])[counted].mean(),
            "policy/mean_ratio": (args[5] - args[0])[counted].exp().mean(),  # of this process alone
        }
        return policy, value, stats


class OtherLoss(PPOTrainer):
    """A `loss` of another formula: a mean over this process's tokens, NaN where there is none."""

    def loss(
        self, old_logprobs: Tensor, values: Any, rewards: Any, logits: Any, vpreds: Any, logprobs: Any, mask: Any
    ) -> Any:
        counted = mask.bool()
        policy = (torch.exp(logprobs - old_logprobs) * (values - rewards))[counted].mean()
        value = ((vpreds - rewards) ** 2)[counted].mean()
        stats = {"policy/policykl": (old_logprobs - logprobs)[counted].mean(), "val/error": value.detach()}
        return policy, value, stats | {"returns/var": torch.ones(())}


class OwnMinibatch(PPOTrainer):
    """An overridden `train_minibatch`."""

    def train_minibatch(self, *args: Any, **kwargs: Any) -> Any:
        return super().train_minibatch(*args, **kwargs)


def samples() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Eight queries, responses, scores and log-probabilities of a sampler that was not the policy."""
    random = torch.Generator().manual_seed(5)
    queries = [torch.randint(3, 61, (2 + i % 3,), generator=random) for i in range(8)]
    responses = [torch.randint(3, 61, (length,), generator=random) for length in LENGTHS]
    scores = list(torch.randn(8, generator=random) + torch.arange(8) / 4)
    return queries, responses, scores, [-4 - torch.rand(len(r), generator=random) for r in responses]


def make(kind: type[PPOTrainer], world: int, minibatches: int = 1, **settings: Any) -> PPOTrainer:
    """A trainer with SGD (Adam's first steps would hide a gradient that is off by a factor) on a falling rate."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), summary_dropout_prob=0.0)
    torch.manual_seed(0)
    model.v_head.summary.weight.data.normal_(0, 0.1)
    share = 8 // world // minibatches
    config = PPOConfig(
        batch_size=share * minibatches,
        mini_batch_size=max(1, share // 2),
        gradient_accumulation_steps=share // max(1, share // 2),
        ppo_epochs=2,
        **settings,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    return kind(config, model, None, tiny_tokenizer(), optimizer=optimizer, lr_scheduler=scheduler)


def outcome(trainer: PPOTrainer, stats: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on any number of processes."""
    numbers = {k: float(v) for k, v in stats.items() if not k.startswith(CLOCKS) and not getattr(v, "ndim", 0)}
    return numbers | {
        "norms": [p.double().norm().item() for p in trainer.model.parameters()],
        "gradients": [p.grad.double().norm().item() for p in trainer.model.parameters() if p.grad is not None],
        "rate": trainer.optimizer.param_groups[0]["lr"],
        "scheduled": trainer.lr_scheduler.scheduler.last_epoch,
        "kl_coef": trainer.kl_ctl.value,
        "moments": [trainer.score_moments.mean, trainer.score_moments.std, trainer.score_moments.count],
        "steps": trainer._trl_steps_done,
    }


def draws(trainer: PPOTrainer, **settings: Any) -> list[list[int]]:
    """Responses to the same query everywhere, from a seed that is the same everywhere."""
    torch.manual_seed(3)
    query = torch.tensor([5, 6, 7])
    settings |= {"do_sample": True, "top_k": 0, "return_prompt": False, "max_new_tokens": 8}
    return [response.tolist() for response in trainer.generate([query, query], **settings)]


def report(rank: int, world: int) -> dict[str, Any]:
    share = 8 // world
    local = slice(rank * share, (rank + 1) * share)
    queries, responses, scores, sampler = (part[local] for part in samples())
    found: dict[str, Any] = {"rank": rank}

    trainer = make(PPOTrainer, world, use_score_scaling=True, max_grad_norm=0.5)
    found["world"] = trainer.accelerator.num_processes
    found["own draws"] = draws(trainer)
    found["transformers' draws"] = draws(trainer, bad_words_ids=[[60]])  # which our own loop cannot do
    for _ in range(3):
        stats = trainer.step(queries, responses, scores, sampler_logprobs=sampler)
    found["three steps"] = outcome(trainer, stats)
    logged: list[dict[str, Any]] = []
    trainer.accelerator.log = lambda logs, step: logged.append(logs)
    texts = {"query": [""] * share, "response": [""] * share}
    if trainer.accelerator.is_main_process:  # as scripts do that know that nothing is logged elsewhere
        trainer.log_stats(stats, texts, scores)
        found["logged"] = {name: float(logged[0][f"env/reward_{name}"]) for name in ("mean", "std")}
        found["logged"]["count"] = len(logged[0]["env/reward_dist"])

    masks = [torch.full_like(response, int(rank * share + i < 4)) for i, response in enumerate(responses)]
    for kind in (PPOTrainer, OwnLoss, OtherLoss, OwnMinibatch):
        trainer = make(kind, world)
        found[kind.__name__] = outcome(trainer, trainer.step(queries, responses, scores))
    for kind in (PPOTrainer, OwnLoss):  # steps are refused by the ratio over all processes, or one would step alone
        trainer = make(kind, world, ratio_threshold=1.0)
        found[f"{kind.__name__}, some refused"] = outcome(trainer, trainer.step(queries, responses, scores))
    for kind in (PPOTrainer, OtherLoss):  # the second process has nothing to learn from
        trainer = make(kind, world)
        stats = trainer.step(queries, responses, scores, response_masks=masks)
        found[f"{kind.__name__}, half left out"] = outcome(trainer, stats)
    for kind in (PPOTrainer, OwnMinibatch):
        trainer = make(kind, world, minibatches=2, loss_denominator="batch")
        stats = trainer.step(queries, responses, scores, sampler_logprobs=sampler)
        found[f"{kind.__name__}, all settings"] = outcome(trainer, stats)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    found = report(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        os._exit(0)  # gloo's threads sometimes keep an interpreter from ending


if __name__ == "__main__":
    main()
