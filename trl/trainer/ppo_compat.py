"""PPO by the overridden methods of a subclass, as TRL called them.

`step` always calls `prepare_model_inputs`, `compute_rewards`, `record_step_stats` and `gather_stats`. It calls
`batched_forward_pass`, `loss` and `train_minibatch` if a subclass or the instance overrides them: evaluation and update
then run through the functions here, which need more memory and do not trim padding. `trl.trainer.hooks` knows their
signatures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trl.algorithms.ppo import experience_statistics, ppo_terms
from trl.functional import entropy, importance_weights, masked_sum
from trl.protocols import Reduce
from trl.trainer.hooks import call_in_order, is_newer, is_overridden, takes
from trl.trainer.ppo_settings import ppo_settings
from trl.training.batch import Batch
from trl.training.evaluator import Evaluated, Evaluator
from trl.training.loop import means_of
from trl.training.processes import whole_gradients
from trl.training.statistics import pooled_mean, stack_statistics, update_statistics
from trl.types import ActorCritic, Evaluation, Rollout, Tally, take

if TYPE_CHECKING:
    from trl.trainer.ppo_trainer import PPOTrainer


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
            masks = self._batch.response_masks
            with_masks = (
                {"response_masks": masks} if masks is not None and takes(self._forward, "response_masks") else {}
            )
            logprobs, values, mask = self._passes(evaluator.policy, **with_masks)
            with evaluator.reference() as reference:
                ref_logprobs = self._passes(reference)[0]
            exact = evaluator.kl_over_vocabulary(rollout)
        unmasked = replace(self._batch, response_masks=None).rollout().mask
        masked_out = unmasked & ~rollout.mask  # by response_masks, or for lack of a score
        return Evaluated(
            rollout=replace(rollout, mask=mask & ~masked_out),
            policy=Evaluation(logprobs=logprobs, values=values, entropy=None),
            ref_logprobs=ref_logprobs,
            exact_kl=exact,
        )

    def _passes(self, model: nn.Module, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = self._batch
        logprobs, _, values, masks = self._forward(model, batch.queries, batch.responses, batch.inputs, **more)
        return logprobs, values, masks.bool()


@dataclass(kw_only=True)
class MinibatchContext:
    """Properties of the current minibatch that `loss` and `train_minibatch` have no arguments for."""

    # Scalar: mean tokens per minibatch over all processes, for loss_denominator="batch".
    batch_tokens: Tensor | None = None
    weights: Tensor | None = None  # [b, S] importance weights of the policy loss, if sampler_logprobs were given
    weighted: bool = False  # whether `loss` has applied the weights
    advantages: Tensor | None = None  # [b, S] from compute_advantages; None: `loss` computes them
    returns: Tensor | None = None  # [b, S] likewise

    def weights_for(self, counted: Tensor) -> Tensor | None:
        """The importance weights `[b, S]`, or None.

        Raises:
            RuntimeError: if they have another shape than `counted`.
        """
        if self.weights is None:
            return None
        if self.weights.shape != counted.shape:
            raise RuntimeError(
                f"loss was given a mask of shape {tuple(counted.shape)}, but the minibatch's sampler_logprobs have "
                f"shape {tuple(self.weights.shape)}"
            )
        self.weighted = True
        return self.weights

    def check_weighted(self, trainer: str) -> None:
        """Raises RuntimeError if there are importance weights and `loss` has not applied them."""
        if self.weights is not None and not self.weighted:
            raise RuntimeError(
                f"step was given sampler_logprobs, but the loss of {trainer} ignores them: call super().loss, which "
                "weights the policy loss by them, or do not pass them"
            )


def minibatch_loss(
    trainer: PPOTrainer,
    old_logprobs: Tensor,
    values: Tensor,
    logits: Tensor,
    vpreds: Tensor,
    logprobs: Tensor,
    counted: Tensor,
    *,
    advantages: Tensor,
    returns: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Implements `PPOTrainer.loss`, given advantages and returns; `counted` is its mask, as bools."""
    entropies = entropy(logits)
    if entropies.shape != counted.shape:  # TRL 0.4.6 took any logits here, such as [B, S]
        entropies = entropies.mean().expand(counted.shape)
    terms = ppo_terms(
        logprobs,
        vpreds,
        entropies,
        old_logprobs=old_logprobs,
        old_values=values,
        advantages=advantages,
        returns=returns,
        mask=counted,
        settings=ppo_settings(trainer.config),
        weights=trainer._trl_minibatch_context.weights_for(counted),
    )
    reduce = trainer._trl_reduce
    means = means_of([{name: tally.detach() for name, tally in terms.metrics.items()}], reduce)
    stats = {name: torch.tensor(mean) for name, mean in means.items()}
    stats |= experience_statistics(advantages=advantages, returns=returns, values=values, mask=counted, reduce=reduce)
    vf_coef = float(trainer.config.vf_coef or 0)
    return (
        terms.metrics["loss/policy"].mean(),
        vf_coef * terms.metrics["loss/value"].mean(),
        stats | dict(terms.arrays),
    )


def take_step(
    trainer: PPOTrainer,
    loss: Tensor,
    stats: dict[str, Tensor],
    logprobs: Tensor,
    old_logprobs: Tensor,
    vpreds: Tensor,
    counted: Tensor,
) -> dict[str, Tensor]:
    """Takes the optimizer step of `PPOTrainer.train_minibatch` on `loss`, a mean over this process's counted tokens."""
    context = trainer._trl_minibatch_context
    context.check_weighted(type(trainer).__name__)
    objective = share_of_mean(
        loss, logprobs, vpreds, counted, all_tokens=context.batch_tokens, reduce=trainer._trl_reduce
    )
    updater = trainer._trl_updater()
    refused = None
    if trainer.config.ratio_threshold is not None:  # of all processes, whatever statistics an override of loss returns
        ratio = (logprobs.detach() - old_logprobs).masked_fill(~counted, 0.0).exp()
        mean_ratio = pooled_mean(Tally.of(ratio, counted), trainer._trl_reduce)
        refused = trainer._trl_refuse({"policy/mean_ratio": float(mean_ratio)})
    with whole_gradients(trainer.accelerator):
        updater.clear()
        updater.accumulate(objective)
        return stats | update_statistics(*updater.step(refused=refused))


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


def uses_final_advantages(trainer: Any, base: type) -> bool:
    """Whether advantages come whitened from `compute_advantages`, as in TRL 0.5 to 0.11, and not from `loss`."""
    return is_overridden(trainer, base, "compute_advantages") or any(
        is_newer(trainer, base, name) for name in ("loss", "train_minibatch")
    )


def update_by_methods(trainer: PPOTrainer, base: type, experience: ActorCritic, batch: Batch) -> dict[str, Tensor]:
    """Runs the update through the methods of `trainer`, a `base`; returns statistics, a row per optimizer step."""
    try:
        return stack_statistics(_history(trainer, base, experience, batch))
    finally:
        trainer._trl_minibatch_context = MinibatchContext()


def _history(trainer: PPOTrainer, base: type, experience: ActorCritic, batch: Batch) -> list[dict[str, Tensor]]:
    config, reduce = trainer.config, trainer._trl_reduce
    history: list[dict[str, Tensor]] = []
    batch_tokens = None
    if config.loss_denominator == "batch":
        all_tokens = reduce(experience.rollout.mask.sum().float())
        batch_tokens = all_tokens * config.samples_per_update / len(experience)
    for _ in range(int(config.ppo_epochs or 1)):
        order = torch.randperm(len(experience), generator=trainer._trl_generator, device="cpu")
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
            final = uses_final_advantages(trainer, base)
            context = MinibatchContext(batch_tokens=batch_tokens, weights=weights)
            if final:
                context.advantages, context.returns = part.advantages, part.returns
            trainer._trl_minibatch_context = context
            minibatch = batch.rows(rows)
            logprobs, logits, values, _ = trainer.batched_forward_pass(
                trainer.model, minibatch.queries, minibatch.responses, minibatch.inputs, return_logits=True
            )
            assert logits is not None
            arguments = {
                "old_logprobs": part.old_logprobs,
                "values": part.old_values,
                "rewards": part.rewards,
                "logprobs": logprobs,
                "logits": logits,
                "vpreds": values,
                "mask": mask.long(),
                "advantages": context.advantages,
                "returns": context.returns,
            }
            stats = call_in_order(trainer, base, "train_minibatch", arguments)
            context.check_weighted(type(trainer).__name__)
            history.append(_pool({n: torch.as_tensor(v).detach() for n, v in stats.items()}, mask, trainer))
            if trainer._trl_stops_early(history[-1]):
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
