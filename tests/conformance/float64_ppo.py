"""PPO once more, in float64: one sequence at a time, no padding, no masks, and nothing imported from `trl`.

Losses, advantages, whitening, scores, KL and the optimizer's steps are written down from docs/ppo.md; every number is a float of
Python's but for what a gradient flows through.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

KL = {
    "kl": lambda r: r,
    "abs": abs,
    "mse": lambda r: r * r / 2,
    "k3": lambda r: math.exp(-r) - 1 + r,
}


def mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def variance(numbers: Sequence[float]) -> float:
    return statistics.variance(numbers) if len(numbers) > 1 else 0.0


def white(numbers: Sequence[float], *, keep_mean: bool = False) -> list[float]:
    center, spread = mean(numbers), math.sqrt(variance(numbers) + 1e-8)
    return [(x - center) / spread + (center if keep_mean else 0.0) for x in numbers]


class Float64PPO:
    """Learns beside a trainer, from copies of its models.

    Args:
        model: the policy with its value head.
        reference: likewise; None: the policy with its adapter off.
        config: PPOConfig, whose numbers alone are read.
        optimizer: makes one of parameters.
        stops: token ids that end a response.
    """

    def __init__(
        self, model: Any, reference: Any, config: Any, optimizer: Callable[..., Any], stops: Sequence[int]
    ) -> None:
        self.model = copy.deepcopy(model).double().eval()
        self.reference = None if reference is None else copy.deepcopy(reference).double().eval()
        self.config, self.stops = config, set(stops)
        self.kl_coef = config.init_kl_coef
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.orders = torch.Generator().manual_seed(config.seed)
        self.scores_seen: list[float] = []
        self.steps = 0
        self.start = int(model.config.is_encoder_decoder)  # tokens of a response that are given, not sampled

    def look(self, model: Any, query: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[R]` log-probabilities and values of the sampled tokens, `[R, V]` of all words."""
        more = {"output_hidden_states": True, "use_cache": False}
        if self.start:
            out = model.pretrained_model(input_ids=query[None], decoder_input_ids=response[None], **more)
            logits, hidden, tokens = out.logits[0, :-1], out.decoder_hidden_states[-1][0, :-1], response[1:]
        else:
            first = len(query) - 1
            out = model.pretrained_model(input_ids=torch.cat([query, response])[None], **more)
            logits, hidden, tokens = out.logits[0, first:-1], out.hidden_states[-1][0, first:-1], response
        words = torch.log_softmax(logits / self.config.temperature, dim=-1)
        head = model.v_head.summary
        return words[torch.arange(len(tokens)), tokens], hidden @ head.weight[0] + head.bias, words

    def look_at_reference(self, query: Tensor, response: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.reference is not None:
            return self.look(self.reference, query, response)
        with self.model.pretrained_model.disable_adapter():
            return self.look(self.model, query, response)

    def shaped(self, scores: Sequence[float], responses: Sequence[Tensor], counted: Sequence[bool]) -> list[float]:
        c = self.config
        if c.missing_eos_penalty is not None:
            scores = [s if int(r[-1]) in self.stops else s - c.missing_eos_penalty for s, r in zip(scores, responses)]
        if c.use_score_scaling:
            self.scores_seen += [s for s, counts in zip(scores, counted) if counts]
            center = mean(self.scores_seen) if c.use_score_norm else 0.0
            scores = [(s - center) / (math.sqrt(variance(self.scores_seen)) or 1.0) for s in scores]
        if c.score_clip is not None:
            scores = [min(max(s, -c.score_clip), c.score_clip) for s in scores]
        return list(scores)

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None = None,
        token_rewards: Sequence[Tensor] | None = None,
        sampler_logprobs: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """As the trainer's; statistics by its names."""
        c, batch = self.config, range(len(queries))
        masks = response_masks or [torch.ones(len(r)) for r in responses]
        own = [[t for t in range(len(r) - self.start) if m[t + self.start] != 0] for r, m in zip(responses, masks)]
        with torch.no_grad():
            before = [self.look(self.model, queries[b], responses[b]) for b in batch]
            anchor = [self.look_at_reference(queries[b], responses[b]) for b in batch]
        old = [[float(before[b][0][t]) for t in own[b]] for b in batch]
        gaps = [[float(before[b][0][t] - anchor[b][0][t]) for t in own[b]] for b in batch]
        values = [[float(before[b][1][t]) for t in own[b]] for b in batch]
        if c.kl_penalty == "full":
            p, q = ([looked[2] for looked in both] for both in (before, anchor))
            kl = [[float((p[b][t].exp() * (p[b][t] - q[b][t])).sum()) for t in own[b]] for b in batch]
        else:
            kl = [[KL[c.kl_penalty](gap) for gap in row] for row in gaps]
        penalties = [[-self.kl_coef * x for x in row] for row in kl]
        given = [float(score) for score in scores]
        shaped = self.shaped(given, responses, [bool(row) for row in own])
        rewards = [list(row) for row in penalties]
        for b in batch:
            for i, t in enumerate(own[b]):
                rewards[b][i] += float(token_rewards[b][t + self.start]) if token_rewards else 0.0
                rewards[b][i] += shaped[b] if t == own[b][-1] else 0.0
        if c.whiten_rewards:
            flat = iter(white([x for row in rewards for x in row], keep_mean=True))
            rewards = [[next(flat) for _ in row] for row in rewards]
        advantages: list[list[float]] = []
        for b in batch:
            row, running, following = [], 0.0, 0.0
            for reward, value in zip(reversed(rewards[b]), reversed(values[b])):
                running = reward + c.gamma * following - value + c.gamma * c.lam * running
                row.insert(0, running)
                following = value
            advantages.append(row)
        self.experience = (old, values, advantages, sampler_logprobs, own, queries, responses)
        tokens, size = sum(map(len, own)), c.mini_batch_size * c.gradient_accumulation_steps
        history: list[dict[str, float]] = []
        for _ in range(c.ppo_epochs):
            order = torch.randperm(len(queries), generator=self.orders).tolist()
            parts = [[b for b in order[i : i + size] if own[b]] for i in range(0, len(order), size)]
            for rows in filter(None, parts):
                average = tokens * size / len(queries) if c.loss_denominator == "batch" else None
                history.append(self.update(rows, average))
                if c.early_stopping and history[-1]["ppo/policy/policykl"] > 1.5 * c.target_kl:
                    break
            else:
                continue
            break
        kept = [b for b in batch if own[b]]
        averages = {name: mean([update[name] for update in history]) for name in history[0]}
        spread = averages["ppo/returns/var"]
        found = averages | {
            "objective/kl": math.fsum(x for row in gaps for x in row) / len(kept),
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": -math.fsum(x for row in old for x in row) / len(kept),
            "ppo/mean_scores": mean([given[b] for b in kept]),
            "ppo/std_scores": math.sqrt(variance([given[b] for b in kept])),
            "ppo/mean_non_score_reward": mean([x for row in penalties for x in row]),
            "ppo/val/var_explained": 1 - averages["ppo/val/error"] / spread if spread else 0.0,
        }
        if sampler_logprobs:
            seen = [float(sampler_logprobs[b][t + self.start]) for b in batch for t in own[b]]
            found["objective/sampler_gap"] = mean([abs(x - y) for x, y in zip([x for row in old for x in row], seen)])
        if c.adap_kl_ctrl:
            error = min(max(found["objective/kl"] / c.target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * len(kept) / c.horizon
        self.steps += 1
        return found

    def update(self, rows: Sequence[int], denominator: float | None) -> dict[str, float]:
        """One optimizer step; what it measured."""
        c = self.config
        old, values, advantages, sampler_logprobs, own, queries, responses = self.experience
        whitened = iter(white([a for b in rows for a in advantages[b]]))
        self.model.zero_grad()
        sums = dict.fromkeys(
            ("loss/policy", "loss/value", "policy/entropy", "policy/approxkl", "policy/policykl", "policy/clipfrac",
             "val/vpred", "val/error", "val/clipfrac"), 0.0,
        )  # fmt: skip
        loss = torch.zeros((), dtype=torch.float64)
        for b in rows:
            logprobs, critic, words = self.look(self.model, queries[b], responses[b])
            for i, t in enumerate(own[b]):
                advantage, target = next(whitened), advantages[b][i] + values[b][i]
                ratio = (logprobs[t] - old[b][i]).exp()
                plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
                policy = torch.maximum(plain, clipped)
                if c.dual_clip is not None and advantage < 0:
                    policy = policy.clamp(max=-c.dual_clip * advantage)
                if sampler_logprobs:
                    policy = policy * min(
                        math.exp(old[b][i] - float(sampler_logprobs[b][t + self.start])), c.importance_cap
                    )
                near = critic[t].clamp(values[b][i] - c.cliprange_value, values[b][i] + c.cliprange_value)
                errors = (critic[t] - target) ** 2, (near - target) ** 2
                value = 0.5 * torch.maximum(*errors)
                loss = loss + policy + c.vf_coef * value
                drift = float(logprobs[t].detach()) - old[b][i]
                numbers = (policy, value, -(words[t].exp() * words[t]).sum(), drift**2 / 2, -drift, clipped > plain,
                           critic[t], errors[0], errors[1] > errors[0])  # fmt: skip
                for name, number in zip(sums, numbers, strict=True):
                    sums[name] += number.item() if isinstance(number, Tensor) else number
        count = sum(len(own[b]) for b in rows)
        (loss / (count if denominator is None else denominator)).backward()
        if self.steps < c.value_warmup_steps:
            for name, parameter in self.model.named_parameters():
                if not name.startswith("v_head."):
                    parameter.grad = None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = math.sqrt(math.fsum(float((g * g).sum()) for g in gradients))
        for gradient in gradients if c.max_grad_norm is not None else ():
            gradient.mul_(min(1.0, c.max_grad_norm / (norm + 1e-6)))
        self.optimizer.step()
        returns = [a + v for b in rows for a, v in zip(advantages[b], values[b])]
        critics = [v for b in rows for v in values[b]]
        averages = {f"ppo/{name}": total / count for name, total in sums.items()}
        return averages | {
            "ppo/loss/total": averages["ppo/loss/policy"] + c.vf_coef * averages["ppo/loss/value"],
            "ppo/returns/mean": mean(returns),
            "ppo/returns/var": variance(returns),
            "ppo/val/mean": mean(critics),
            "ppo/val/var": variance(critics),
            "ppo/grad_norm": norm,
        }
