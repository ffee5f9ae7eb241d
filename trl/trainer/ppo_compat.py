"""PPO by the overridden methods of a subclass, as TRL 0.4.6 called them.

`step` always calls `prepare_model_inputs`, `compute_rewards`, `record_step_stats` and `gather_stats`. It calls
`batched_forward_pass`, `loss` and `train_minibatch` if a subclass or the instance overrides them: evaluation and update then
run through the functions here, which need more memory and do not trim padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trl.functional import importance_weights, masked_sum
from trl.protocols import Reduce
from trl.training.batch import Batch
from trl.training.evaluator import Evaluated, Evaluator
from trl.training.statistics import stack_statistics
from trl.types import ActorCritic, Evaluation, Rollout, take

if TYPE_CHECKING:
    from trl.trainer.ppo_trainer import PPOTrainer


def is_overridden(trainer: Any, base: type, *names: str) -> bool:
    """Whether a subclass of `base`, or the instance `trainer` itself, overrides any of these methods."""
    return any(name in vars(trainer) or getattr(type(trainer), name) is not getattr(base, name) for name in names)


class MethodEvaluator:
    """Evaluates a batch by an overridden `batched_forward_pass`, whose masks mark the tokens that count.

    Args:
        forward: the method.
        batch: queries, responses and inputs for it.
        evaluator: models and settings; uses the weights as stored, like an update by methods.
    """

    def __init__(self, forward: Callable[..., Any], batch: Batch, evaluator: Evaluator) -> None:
        self._forward, self._batch, self._evaluator = forward, batch, evaluator

    def __call__(self, rollout: Rollout) -> Evaluated:
        """Evaluates policy and reference."""
        evaluator = self._evaluator
        with evaluator.evaluating():
            logprobs, values, mask = self._passes(evaluator.policy)
            with evaluator.reference() as reference:
                ref_logprobs = self._passes(reference)[0]
            exact = evaluator.kl_over_vocabulary(rollout)
        masked_out = self._batch.rollout().mask & ~rollout.mask  # by response_masks, or for lack of a score
        return Evaluated(
            rollout=replace(rollout, mask=mask & ~masked_out),
            policy=Evaluation(logprobs=logprobs, values=values, entropy=None),
            ref_logprobs=ref_logprobs,
            exact_kl=exact,
        )

    def _passes(self, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._batch
        logprobs, _, values, masks = self._forward(model, batch.queries, batch.responses, batch.inputs)
        return logprobs, values, masks.bool()


@dataclass(kw_only=True)
class MinibatchContext:
    """Properties of the current minibatch that the signatures of `loss` and `train_minibatch` have no room for."""

    # Scalar: mean tokens per minibatch over all processes, for loss_denominator="batch".
    batch_tokens: Tensor | None = None
    weights: Tensor | None = None  # [b, S] importance weights of the policy loss, if sampler_logprobs were given
    weighted: bool = False  # whether `loss` has applied the weights

    def weights_for(self, counted: Tensor) -> Tensor | None:
        """The importance weights `[b, S]`, or None.

        Raises:
            RuntimeError: if they have another shape than `counted`.
        """
        if self.weights is None:
            return None
        if self.weights.shape != counted.shape:
            raise RuntimeError(
                f"loss was given a mask of shape {tuple(counted.shape)}, but the minibatch's sampler_logprobs have shape "
                f"{tuple(self.weights.shape)}"
            )
        self.weighted = True
        return self.weights

    def check_weighted(self, trainer: str) -> None:
        """Raises RuntimeError if there are importance weights and `loss` has not applied them."""
        if self.weights is not None and not self.weighted:
            raise RuntimeError(
                f"step was given sampler_logprobs, but the loss of {trainer} ignores them: call super().loss, which weights "
                "the policy loss by them, or do not pass them"
            )


def share_of_mean(
    mean: Tensor, logprobs: Tensor, vpreds: Tensor, counted: Tensor, *, all_tokens: Tensor | None, reduce: Reduce
) -> Tensor:
    """Rescales a mean over this process's tokens to its share of the mean over the tokens of all processes.

    Args:
        mean: scalar loss, averaged over this process's counted tokens.
        logprobs: `[B, S]`; together with `vpreds` it connects every weight to the backward pass.
        vpreds: `[B, S]`.
        counted: `[B, S]` bool, the tokens that count.
        all_tokens: scalar to divide the sum over all processes by; by default, their number of tokens.
        reduce: sums a tensor over all processes.
    """
    local_tokens = counted.sum().float()
    if all_tokens is None:
        all_tokens = reduce(local_tokens)
    if local_tokens == 0:  # the mean may be NaN, yet every process must take part in the backward pass
        return masked_sum(logprobs, counted) + masked_sum(vpreds, counted)
    return mean * (local_tokens / all_tokens.clamp(min=1))


def update_by_methods(trainer: PPOTrainer, experience: ActorCritic, batch: Batch) -> dict[str, Tensor]:
    """Runs the update through the trainer's methods; returns their statistics, one row per optimizer step."""
    try:
        return stack_statistics(_history(trainer, experience, batch))
    finally:
        trainer._trl_minibatch_context = MinibatchContext()


def _history(trainer: PPOTrainer, experience: ActorCritic, batch: Batch) -> list[dict[str, Tensor]]:
    config, reduce = trainer.config, trainer._trl_reduce
    history: list[dict[str, Tensor]] = []
    batch_tokens = None
    if config.loss_denominator == "batch":
        all_tokens = reduce(experience.rollout.mask.sum().float())
        batch_tokens = all_tokens * config.samples_per_update / len(experience)
    for _ in range(int(config.ppo_epochs or 1)):
        order = torch.randperm(len(experience), generator=trainer._trl_generator)
        for rows in order.split(config.samples_per_update):
            part = take(experience, rows.to(trainer.current_device))
            mask = part.rollout.mask
            if float(reduce(mask.sum().float())) == 0:
                continue
            weights = None
            if part.rollout.sampler_logprobs is not None:
                weights = importance_weights(
                    part.old_logprobs, part.rollout.sampler_logprobs, mask, cap=config.importance_cap
                )
            trainer._trl_minibatch_context = MinibatchContext(batch_tokens=batch_tokens, weights=weights)
            minibatch = batch.rows(rows)
            logprobs, logits, values, _ = trainer.batched_forward_pass(
                trainer.model, minibatch.queries, minibatch.responses, minibatch.inputs, return_logits=True
            )
            assert logits is not None
            stats = trainer.train_minibatch(
                part.old_logprobs, part.old_values, part.rewards, logprobs, logits, values, mask.long()
            )
            trainer._trl_minibatch_context.check_weighted(type(trainer).__name__)
            history.append(_pool({n: torch.as_tensor(v).detach() for n, v in stats.items()}, mask, trainer))
            if trainer._trl_stops_early(float(history[-1]["policy/policykl"])):
                return history
    return history


def _pool(stats: dict[str, Tensor], counted: Tensor, trainer: PPOTrainer) -> dict[str, Tensor]:
    """Turns scalars averaged over this process's counted tokens [B, S] into averages over all processes' tokens."""
    if not trainer.is_distributed:
        return stats
    # Select by dimension, not size: an array may happen to hold a single number on one process.
    names = [name for name, value in stats.items() if value.dim() == 0]
    tokens = counted.sum().double()
    values = torch.stack([stats[name].to(tokens) for name in names] + [torch.ones_like(tokens)])
    sums = trainer._trl_reduce((values * tokens).masked_fill(tokens == 0, 0.0))
    return stats | dict(zip(names, sums[:-1] / sums[-1], strict=True))
