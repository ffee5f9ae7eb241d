"""PPO behind one call: `stats = ppo_trainer.step(queries, responses, scores)`.

`PPOTrainer` has the names and contracts of TRL 0.4.6. Its step is that of `OnlineTrainer`; the methods here are the
pieces of PPO that a subclass or a script may call or override (`trl.trainer.ppo_compat`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl import functional, legacy
from trl.algorithms.ppo import PPO
from trl.functional import exact_kl, gae, k1, k1_abs, k2, k3, shape_rewards
from trl.models import PreTrainedModelWrapper
from trl.trainer.hooks import call_in_order, call_rewards, check_overrides, in_either_order, is_overridden
from trl.trainer.online import OnlineTrainer
from trl.trainer.ppo_compat import (
    MethodEvaluator,
    MinibatchContext,
    minibatch_loss,
    take_step,
    update_by_methods,
    uses_final_advantages,
)
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_settings import ppo_settings, reward_settings
from trl.trainer.setting_names import names_unknown_arguments
from trl.training.batch import Batch
from trl.training.batched import evaluate_in_batches
from trl.training.evaluator import Evaluated, Evaluator
from trl.types import ActorCritic, Experience, Rollout

# Keys that `prepare_model_inputs` may return: those that forward passes read, and what language-model collators add.
_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"}
_KL_OF_TOKEN = {"kl": k1, "abs": k1_abs, "mse": k2, "k3": k3}

if not TYPE_CHECKING:  # type checkers still report unknown names
    __getattr__ = legacy.lookup(__name__)


class PPOTrainer(OnlineTrainer):
    """Trains a language model with a value head using proximal policy optimisation (PPO).

    Follows Ziegler et al. 2019 (arXiv:1909.08593): PPO (Schulman et al. 2017, arXiv:1707.06347) on one score per
    response, minus a KL penalty that keeps the policy close to a reference model.

    Args:
        config: settings.
        model: policy with a value head. For a PEFT model, only the adapter and the value head are trained.
        ref_model: frozen reference model, also with a value head. If None: for a PEFT model whose adapter starts at
            zero, the model with the adapter disabled; otherwise a frozen copy of `model`.
        training_data_collator: pads a list of `input_ids` and `attention_mask` into the inputs of a step; by default,
            on the tokenizer's padding side.

    `OnlineTrainer` describes the other arguments and the errors. A TypeError says that a subclass overrides a method of
    TRL that is never called here.
    """

    _trl_minibatch_context = MinibatchContext()
    _trl_exact_kl: Tensor | None = None  # [B, S], while an override of compute_rewards runs that does not take it
    _trl_returns_kl = False  # whether compute_rewards returns the KL as well, as in TRL 0.7 to 0.11

    @names_unknown_arguments
    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        training_data_collator: Callable[..., Any] | None = None,
    ) -> None:
        check_overrides(self, PPOTrainer)
        super().__init__(
            config, model, ref_model, tokenizer, dataset, optimizer, data_collator, num_shared_layers, lr_scheduler
        )
        if training_data_collator is not None:
            self.data_collator = training_data_collator

    # The algorithm ---------------------------------------------------------------------------------------------------

    def _trl_algorithm(self, evaluate: Callable[[Rollout], Evaluated]) -> PPO:
        return PPO(
            setup=self._trl_setup(evaluate),
            rewards=partial(call_rewards, self),
            shaping=reward_settings(self.config, self._trl_score_moments, self._trl_stop_tokens()),
            advantages=self.compute_advantages if uses_final_advantages(self, PPOTrainer) else None,
            settings=ppo_settings(self.config),
        )

    def _trl_evaluation(self, batch: Batch, evaluator: Evaluator) -> Callable[[Rollout], Evaluated]:
        evaluator = replace(evaluator, exact_kl=self.config.kl_penalty == "full")
        if self._trl_updates_by_methods():  # the update uses the weights as stored, so evaluation must, too
            evaluator = replace(evaluator, compute=None, known=None)
        if is_overridden(self, PPOTrainer, "batched_forward_pass"):
            return MethodEvaluator(self.batched_forward_pass, batch, evaluator)
        if unread := sorted(set(batch.inputs) - _INPUTS):
            raise ValueError(
                f"prepare_model_inputs returned {', '.join(unread)}, which forward passes do not read: also override "
                "batched_forward_pass, or return only what they read"
            )
        return evaluator

    def _trl_updates_by_methods(self) -> bool:
        return is_overridden(self, PPOTrainer, "loss", "train_minibatch", "batched_forward_pass")

    def _trl_update(self, experience: Experience, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(experience, ActorCritic)
        single_sample = self.config.samples_per_update == 1 < len(experience) and not self.is_distributed
        if single_sample and int(experience.rollout.mask.sum(dim=1).max()) == 1:
            warnings.warn(
                "every optimizer step trains on a single token, whose whitened advantage is 0: the policy learns "
                "nothing. Set mini_batch_size * gradient_accumulation_steps above 1",
                stacklevel=4,
            )
        if self._trl_updates_by_methods():
            return update_by_methods(self, PPOTrainer, experience, batch)
        return super()._trl_update(experience, batch)

    def _trl_not_updated(self) -> list[nn.Parameter]:
        if self._trl_steps_done >= self.config.value_warmup_steps:
            return []
        return [p for name, p in self.model.named_parameters() if "v_head." not in name]

    def _trl_before_update(self, experience: Experience) -> None:
        super()._trl_before_update(experience)
        assert isinstance(experience, ActorCritic)
        self._trl_score_moments += experience.score_moments

    def _trl_after_update(self, stats: Mapping[str, Any], rows: int) -> None:
        self.kl_ctl.update(stats["objective/kl"], rows)

    # Pieces of a step
    # ------------------------------------------------------------------------------------------------------

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: list[Tensor],
        responses: list[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Evaluates a model on a batch, `config.mini_batch_size` sequences at a time. Differentiable.

        Args:
            model: model with a value head.
            queries: `B` 1-D tensors.
            responses: `B` 1-D tensors.
            model_inputs: output of `prepare_model_inputs`, padded on either side.
            return_logits: also return the logits, which hold `B · S · V` numbers.
            response_masks: one number per response token, 0 where it does not count.

        Returns:
            logprobs [B, S]; logits [B, S, V], divided by the temperature, or None; values [B, S]; masks [B, S] int64,
            1 where a response token is predicted.
        """
        rollout = Batch(
            queries=queries,
            responses=responses,
            inputs=model_inputs,
            is_encoder_decoder=self.is_encoder_decoder,
            response_masks=response_masks,
        ).rollout()
        evaluation = evaluate_in_batches(
            model,
            rollout,
            batch_size=int(self.config.mini_batch_size or 1),
            temperature=self.config.temperature,
            return_logits=return_logits,
        )
        assert evaluation.values is not None
        logits = None if evaluation.logits is None else evaluation.logits / self.config.temperature
        return evaluation.logprobs, logits, evaluation.values, rollout.mask.long()

    def compute_rewards(
        self,
        scores: Sequence[Tensor] | Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        masks: Tensor,
        kl: Tensor | None = None,
        token_rewards: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Per-token rewards: the score on the last response token, minus the KL penalty on every token.

        Args:
            scores: `B` scores.
            logprobs: `[B, S]` log-probabilities under the policy.
            ref_logprobs: `[B, S]` log-probabilities under the reference.
            masks: `[B, S]`, non-zero where a response token is predicted.
            kl: `[B, S]` per-token KL; estimated according to `config.kl_penalty` if None.
            token_rewards: `[B, S]` rewards to add.

        Returns:
            Rewards `[B, S]` and their non-score part `[B, S]`; both 0 off the mask.

        Raises:
            ValueError: if `config.kl_penalty` is "full" and `kl` is not given, or `_kl_penalty` is overridden.
        """
        by_hook = is_overridden(self, PPOTrainer, "_kl_penalty")
        if by_hook and self.config.kl_penalty == "full":
            raise ValueError(
                f"kl_penalty='full' is computed without logits of whole sequences, so without _kl_penalty, which "
                f"{type(self).__name__} overrides: choose another kl_penalty"
            )
        if by_hook:
            kl = torch.stack([self._kl_penalty(p, q) for p, q in zip(logprobs, ref_logprobs, strict=True)])
        elif kl is None and self._trl_exact_kl is not None:
            kl = self._trl_exact_kl
        elif kl is None:
            if self.config.kl_penalty == "full":
                raise ValueError("kl_penalty='full' cannot be computed from logprobs: pass kl [B, S]")
            kl = _KL_OF_TOKEN[self.config.kl_penalty](logprobs, ref_logprobs)
        stacked = (
            scores if isinstance(scores, Tensor) else torch.stack([torch.as_tensor(s).reshape(()) for s in scores])
        )
        rewards, penalty = shape_rewards(
            stacked.to(kl.device), kl, masks.bool(), kl_coef=self.kl_ctl.value, token_rewards=token_rewards
        )
        return (rewards, penalty, kl) if self._trl_returns_kl else (rewards, penalty)

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """KL of each token of one sequence, `[S]`, by `config.kl_penalty`; a hook of TRL 0.5 to 0.11.

        Args:
            logprob: `[S]` under the policy; for "full", `[S, V]` over the vocabulary.
            ref_logprob: the same under the reference.
        """
        if self.config.kl_penalty == "full":
            return exact_kl(logprob, ref_logprob)
        return _KL_OF_TOKEN[self.config.kl_penalty](logprob, ref_logprob)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages whitened over the whole batch, as TRL 0.5 to 0.11 computed them; a hook.

        A step whitens them in each minibatch, as TRL 0.4.6, unless this is overridden, or a `loss` or `train_minibatch`
        that takes advantages.

        Args:
            values: `[B, S]` before the update.
            rewards: `[B, S]` per-token rewards.
            mask: `[B, S]`, non-zero where a response token is predicted.

        Returns:
            Values, advantages and returns, `[B, S]`, 0 off the mask.
        """
        counted = mask.bool()
        if self.config.whiten_rewards:
            rewards = functional.masked_whiten(rewards, counted, shift_mean=False, reduce=self._trl_reduce)
        advantages, returns = self._trl_gae(rewards, values, counted)
        advantages = functional.masked_whiten(advantages, counted, reduce=self._trl_reduce)
        return values.masked_fill(~counted, 0.0), advantages, returns

    def _trl_gae(self, rewards: Tensor, values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, counted, gamma=float(self.config.gamma or 0), lam=float(self.config.lam or 0))

    def _early_stop(self, policykl: Tensor | float) -> bool:
        """Whether the update of a batch ends, asked after each optimizer step if `config.early_stopping`; a hook.

        Args:
            policykl: mean KL of the policy to the one before the update, in nats per token, over all processes.
        """
        return super()._trl_kl_is_too_high(float(policykl))

    def _trl_kl_is_too_high(self, policy_kl: float) -> bool:
        return bool(self._early_stop(torch.tensor(policy_kl)))

    @in_either_order
    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        rewards: Tensor | None,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor | None = None,
        returns: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """PPO loss of one minibatch; computes and whitens the advantages itself, unless they are given.

        It may also be called in the order of TRL 0.5 to 0.11: without `rewards`, with `advantages` and `returns` at the
        end.

        Args:
            old_logprobs: `[B, S]` log-probabilities before the update.
            values: `[B, S]` values before the update.
            rewards: `[B, S]` per-token rewards.
            logits: `[B, S, V]` current logits, used only for the entropy.
            vpreds: `[B, S]` current values.
            logprobs: `[B, S]` current log-probabilities.
            mask: `[B, S]`, non-zero where a response token is predicted.
            advantages: `[B, S]`, used as they are.
            returns: `[B, S]` value targets, along with `advantages`.

        Returns:
            The policy loss and `vf_coef` times the value loss, as differentiable scalars averaged over this process's
            tokens, and statistics by name, whose scalars cover all processes.
        """
        if advantages is None or returns is None:
            context = self._trl_minibatch_context
            advantages, returns = context.advantages, context.returns
        if advantages is None or returns is None:
            assert rewards is not None
            advantages, returns = self._trl_gae(rewards, values, mask.bool())
            advantages = functional.masked_whiten(advantages, mask.bool(), reduce=self._trl_reduce)
        return minibatch_loss(
            self, old_logprobs, values, logits, vpreds, logprobs, mask.bool(), advantages=advantages, returns=returns
        )

    @in_either_order
    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        rewards: Tensor | None,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor | None = None,
        returns: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Takes one optimizer step on a minibatch after its forward pass. Arguments as for `loss`.

        The gradient is that of the loss over the tokens of all processes, normalised according to
        `config.loss_denominator`. An override that calls `backward` itself gets the per-process gradients averaged over
        processes instead.

        Returns:
            The statistics of `loss`, plus `grad_norm`, `skipped_updates` and the seconds of the optimizer step.

        Raises:
            RuntimeError: if `step` was given `sampler_logprobs` and an overridden `loss` ignores them.
        """
        if advantages is None:
            advantages, returns = self._trl_minibatch_context.advantages, self._trl_minibatch_context.returns
        arguments = {name: value for name, value in locals().items() if name != "self"}
        policy_loss, value_loss, stats = call_in_order(self, PPOTrainer, "loss", arguments)
        return take_step(self, policy_loss + value_loss, stats, logprobs, old_logprobs, vpreds, mask.bool())
