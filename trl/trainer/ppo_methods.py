"""Public building blocks of a PPO step, with the names and contracts of TRL 0.4.6.

`PPOTrainer.step` is built on the same functions, and overrides in a subclass take effect: `step` always calls
`prepare_model_inputs`, `compute_rewards`, `record_step_stats` and `gather_stats`, and calls `batched_forward_pass`,
`loss` and `train_minibatch` if they are overridden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from trl.algorithms.ppo import PPOSettings, experience_statistics, ppo_terms
from trl.data import PadCollator, place_on_columns, prompt_loader, response_columns
from trl.functional import (
    entropy,
    gae,
    importance_weights,
    k1,
    k1_abs,
    k2,
    k3,
    masked_sum,
    masked_whiten,
    shape_rewards,
)
from trl.trackers import completions_table
from trl.trainer.base import BaseTrainer
from trl.trainer.ppo_config import PPOConfig
from trl.training.batch import Batch
from trl.training.batched import evaluate_in_batches
from trl.training.compute import Compute
from trl.training.guards import UpdateGuards
from trl.training.loop import Updater, means_of
from trl.training.processes import sum_over_processes, whole_gradients
from trl.training.statistics import step_statistics
from trl.types import ActorCritic, Rollout, take

_KL_OF_TOKEN = {"kl": k1, "abs": k1_abs, "mse": k2, "k3": k3}
_TRAINER_COLUMNS = ("label", "query", "response")


@dataclass(kw_only=True)
class _Minibatch:
    """Context of the current minibatch that TRL 0.4.6's signatures of `loss` and `train_minibatch` cannot carry."""

    batch_tokens: Tensor | None  # scalar: mean tokens per minibatch over all processes, for loss_denominator="batch"
    weights: Tensor | None  # [b, S] importance weights of the policy loss, if sampler_logprobs were given
    weighted: bool = False  # whether `loss` has applied the weights


class PPOMethods(BaseTrainer):
    """Building blocks of `PPOTrainer.step`."""

    config: PPOConfig
    optimizer: Any
    data_collator: PadCollator
    kl_ctl: Any
    compute: Compute
    is_encoder_decoder: bool
    is_distributed: bool
    current_device: torch.device
    current_step: int
    _forward_columns: Sequence[str]
    _steps_done: int
    _generator: torch.Generator
    guards: UpdateGuards
    _minibatch: _Minibatch | None = None  # the current one, during `step`
    _scores_of_step: tuple[Tensor, Tensor] | None = None  # [B] of this process and [n · B] of all n processes

    # Batches ---------------------------------------------------------------------------------------------------------

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> DataLoader[Any]:
        """DataLoader with shuffled batches of `config.batch_size`, dropping an incomplete last batch.

        Args:
            dataset: a torch dataset, or a `datasets.Dataset`, whose unused columns are removed if
                `config.remove_unused_columns`.
            data_collator: turns a list of examples into a batch.

        Raises:
            ValueError: if `dataset` is neither of the two, or is smaller than one batch.
        """
        keep = (*self._forward_columns, *_TRAINER_COLUMNS) if self.config.remove_unused_columns else None
        return prompt_loader(dataset, batch_size=int(self.config.batch_size or 1), collate_fn=data_collator, keep=keep)

    def prepare_model_inputs(self, queries: list[Tensor], responses: list[Tensor]) -> BatchEncoding:
        """Pads queries and responses into model inputs, on the tokenizer's padding side.

        Args:
            queries: `B` 1-D tensors.
            responses: `B` 1-D tensors.

        Returns:
            `input_ids` and `attention_mask` [B, T] of query + response. For an encoder-decoder, those of the queries,
            plus `decoder_input_ids` and `decoder_attention_mask` of the responses.
        """
        device = self.current_device
        if self.is_encoder_decoder:
            encoder = self.data_collator([{"input_ids": q} for q in queries])
            decoder = self.data_collator([{"input_ids": r} for r in responses])
            inputs = encoder | {f"decoder_{name}": tensor for name, tensor in decoder.items()}
        else:
            inputs = self.data_collator(
                [{"input_ids": torch.cat([q, r])} for q, r in zip(queries, responses, strict=True)]
            )
        return BatchEncoding({name: tensor.to(device) for name, tensor in inputs.items()})

    def _attention(self, batch: Batch) -> Tensor:
        """Attention mask `[B, T]` of the sequences with the responses (the decoder's, if separate): 0 on padding."""
        return batch.inputs["decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"]

    def _placed(self, values: Sequence[Tensor], batch: Batch) -> Tensor:
        """Places one number per response token in a `[B, S]` float32 tensor of zeros.

        The number of an encoder-decoder's start token is dropped, since that token is given, not predicted.
        """
        attention = self._attention(batch)
        given = [1] * len(values) if self.is_encoder_decoder else [len(q) for q in batch.queries]
        sampled = [v[1:] for v in values] if self.is_encoder_decoder else values
        columns = response_columns(attention, given, [len(v) for v in sampled])
        return place_on_columns(sampled, columns, attention[:, 1:].float())

    def _rollout(self, batch: Batch) -> Rollout:
        """Converts the batch to a `Rollout`; its mask comes from the lengths."""
        attention = self._attention(batch).bool()
        lengths = [len(r) for r in batch.responses]
        if not self.is_encoder_decoder:
            lengths = [len(q) + n for q, n in zip(batch.queries, lengths, strict=True)]
        for i, (held, length) in enumerate(zip(attention.sum(dim=1).tolist(), lengths, strict=True)):
            if held != length:
                raise ValueError(
                    f"row {i} of the model inputs holds {held} tokens, where queries and responses say {length}: "
                    "prepare_model_inputs may pad, not add or cut"
                )
        mask = self._placed([torch.ones(len(r)) for r in batch.responses], batch).bool()
        read = batch.inputs["decoder_input_ids" if self.is_encoder_decoder else "input_ids"]
        rollout = Rollout(tokens=read, attention=attention, mask=mask, policy_version=self._steps_done)
        if not self.is_encoder_decoder:
            return rollout
        seen = batch.inputs["attention_mask"].bool()
        return replace(rollout, encoder_tokens=batch.inputs["input_ids"], encoder_attention=seen)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: list[Tensor],
        responses: list[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Evaluates a model on a batch, `config.mini_batch_size` sequences at a time. Differentiable.

        Args:
            model: model with a value head.
            queries: `B` 1-D tensors.
            responses: `B` 1-D tensors.
            model_inputs: output of `prepare_model_inputs`, padded on either side.
            return_logits: also return the logits, which hold `B · S · V` numbers.

        Returns:
            logprobs [B, S]; logits [B, S, V], divided by the temperature, or None; values [B, S]; masks [B, S] int64,
            1 where a response token is predicted.
        """
        rollout = self._rollout(Batch(queries, responses, model_inputs))
        result = evaluate_in_batches(
            model,
            rollout,
            batch_size=int(self.config.mini_batch_size or 1),
            temperature=self.config.temperature,
            return_logits=return_logits,
        )
        assert result.values is not None
        logits = None if result.logits is None else result.logits / self.config.temperature
        return result.logprobs, logits, result.values, rollout.mask.long()

    def compute_rewards(
        self,
        scores: Sequence[Tensor] | Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        masks: Tensor,
        kl: Tensor | None = None,
        token_rewards: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
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
            ValueError: if `config.kl_penalty` is "full" and `kl` is not given.
        """
        if kl is None:
            if self.config.kl_penalty == "full":
                raise ValueError("kl_penalty='full' cannot be made of logprobs: give kl [B, S]")
            kl = _KL_OF_TOKEN[self.config.kl_penalty](logprobs, ref_logprobs)
        flat = scores if isinstance(scores, Tensor) else torch.stack([torch.as_tensor(s).reshape(()) for s in scores])
        return shape_rewards(
            flat.to(kl.device), kl, masks.bool(), kl_coef=self.kl_ctl.value, token_rewards=token_rewards
        )

    # Update ----------------------------------------------------------------------------------------------------------

    def _settings(self) -> PPOSettings:
        c = self.config
        return PPOSettings(
            clip_range=float(c.cliprange or 0),
            value_clip_range=float(c.cliprange_value or 0),
            value_coef=float(c.vf_coef or 0),
            dual_clip=c.dual_clip,
            importance_cap=c.importance_cap,
            temperature=c.temperature,
        )

    def _updater(self) -> Updater:
        frozen = []
        if self._steps_done < self.config.value_warmup_steps:
            frozen = [p for name, p in self.model.named_parameters() if "v_head." not in name]
        self.guards.max_skipped = self.config.max_skipped_updates
        return Updater(
            model=self.model,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            max_grad_norm=self.config.max_grad_norm,
            frozen=frozen,
            compute=self.compute,
            guards=self.guards,
            reduce=self._reduce,
        )

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        rewards: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """PPO loss of one minibatch; computes and whitens the advantages itself.

        Args:
            old_logprobs: `[B, S]` log-probabilities before the update.
            values: `[B, S]` values before the update.
            rewards: `[B, S]` per-token rewards.
            logits: `[B, S, V]` current logits, used only for the entropy.
            vpreds: `[B, S]` current values.
            logprobs: `[B, S]` current log-probabilities.
            mask: `[B, S]`, non-zero where a response token is predicted.

        Returns:
            The policy loss and `vf_coef` times the value loss, as differentiable scalars averaged over this process's
            tokens, and statistics by name, whose scalars cover all processes.
        """
        counted = mask.bool()
        advantages, returns = gae(
            rewards, values, counted, gamma=float(self.config.gamma or 0), lam=float(self.config.lam or 0)
        )
        advantages = masked_whiten(advantages, counted, reduce=self._reduce)
        spread = entropy(logits)
        if spread.shape != counted.shape:  # TRL 0.4.6 took any logits here, such as [B, S]
            spread = spread.mean().expand(counted.shape)
        terms = ppo_terms(
            logprobs,
            vpreds,
            spread,
            old_logprobs=old_logprobs,
            old_values=values,
            advantages=advantages,
            returns=returns,
            mask=counted,
            settings=self._settings(),
            weights=self._weights(counted),
        )
        means = means_of([{name: tally.detach() for name, tally in terms.metrics.items()}], self._reduce)
        stats = {name: torch.tensor(mean) for name, mean in means.items()}
        stats |= experience_statistics(
            advantages=advantages, returns=returns, values=values, mask=counted, reduce=self._reduce
        )
        vf_coef = float(self.config.vf_coef or 0)
        return (
            terms.metrics["loss/policy"].mean(),
            vf_coef * terms.metrics["loss/value"].mean(),
            stats | dict(terms.arrays),
        )

    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        rewards: Tensor,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
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
        policy_loss, value_loss, stats = self.loss(old_logprobs, values, rewards, logits, vpreds, logprobs, mask)
        self._check_weighted()
        objective = self._summed(policy_loss + value_loss, logprobs, vpreds, mask.bool())
        updater = self._updater()
        with whole_gradients(self.accelerator):
            updater.clear()
            updater.accumulate(objective, last=True)
            norm, stepped, seconds = updater.step()
        return stats | {
            "grad_norm": torch.tensor(norm),
            "skipped_updates": torch.tensor(float(not stepped)),
            "time/ppo/optimizer_step": torch.tensor(seconds),
        }

    def _summed(self, mean: Tensor, logprobs: Tensor, vpreds: Tensor, counted: Tensor) -> Tensor:
        """Rescales a mean over this process's tokens to its share of the mean over the tokens of all processes.

        Args:
            mean: scalar loss, averaged over this process's counted tokens.
            logprobs: `[B, S]`; together with `vpreds` it connects every weight to the backward pass.
            vpreds: `[B, S]`.
            counted: `[B, S]` bool, the tokens that count.
        """
        local_tokens = counted.sum().float()
        all_tokens = None if self._minibatch is None else self._minibatch.batch_tokens
        if all_tokens is None:
            all_tokens = self._reduce(local_tokens)
        if local_tokens == 0:  # the mean may be NaN, yet every process must take part in the backward pass
            return masked_sum(logprobs, counted) + masked_sum(vpreds, counted)
        return mean * (local_tokens / all_tokens.clamp(min=1))

    def _weights(self, counted: Tensor) -> Tensor | None:
        """Importance weights `[B, S]` of the current minibatch, or None."""
        if self._minibatch is None or self._minibatch.weights is None:
            return None
        if self._minibatch.weights.shape != counted.shape:
            raise RuntimeError(
                f"loss was given a mask of shape {tuple(counted.shape)}; the minibatch, for which step has sampler_logprobs, "
                f"has {tuple(self._minibatch.weights.shape)}"
            )
        self._minibatch.weighted = True
        return self._minibatch.weights

    def _check_weighted(self) -> None:
        if self._minibatch is not None and self._minibatch.weights is not None and not self._minibatch.weighted:
            raise RuntimeError(
                f"step was given sampler_logprobs, and {type(self).__name__} computes its loss without them: call "
                "super().loss, which weights the policy loss by them, or give none"
            )

    def _optimize_by_methods(self, experience: ActorCritic, batch: Batch) -> dict[str, Tensor]:
        """Runs the update through the public methods, for subclasses that override them.

        Needs more memory than the default path and does not trim padding.
        """
        try:
            return _stacked(self._history_by_methods(experience, batch))
        finally:
            self._minibatch = None

    def _history_by_methods(self, experience: ActorCritic, batch: Batch) -> list[dict[str, Tensor]]:
        config = self.config
        history: list[dict[str, Tensor]] = []
        batch_tokens = None
        if config.loss_denominator == "batch":
            all_tokens = self._reduce(experience.rollout.mask.sum().float())
            batch_tokens = all_tokens * config.samples_per_update / len(experience)
        for _ in range(int(config.ppo_epochs or 1)):
            order = torch.randperm(len(experience), generator=self._generator)
            for rows in order.split(config.samples_per_update):
                part = take(experience, rows.to(self.current_device))
                mask = part.rollout.mask
                if float(self._reduce(mask.sum().float())) == 0:
                    continue
                weights = None
                if part.rollout.sampler_logprobs is not None:
                    weights = importance_weights(
                        part.old_logprobs, part.rollout.sampler_logprobs, mask, cap=config.importance_cap
                    )
                self._minibatch = _Minibatch(batch_tokens=batch_tokens, weights=weights)
                some = batch.rows(rows)
                logprobs, logits, values, _ = self.batched_forward_pass(
                    self.model, some.queries, some.responses, some.inputs, return_logits=True
                )
                assert logits is not None
                stats = self.train_minibatch(
                    part.old_logprobs, part.old_values, part.rewards, logprobs, logits, values, mask.long()
                )
                self._check_weighted()
                history.append(self._pooled({n: torch.as_tensor(v).detach() for n, v in stats.items()}, mask))
                if self._stops_early(float(history[-1]["policy/policykl"])):
                    return history
        return history

    def _pooled(self, stats: dict[str, Tensor], counted: Tensor) -> dict[str, Tensor]:
        """Turns scalars averaged over this process's counted tokens [B, S] into averages over all processes' tokens."""
        if not self.is_distributed:
            return stats
        # Select by dimension, not size: an array may happen to hold a single number on one process.
        names = [name for name, value in stats.items() if value.dim() == 0]
        tokens = counted.sum().double()
        values = torch.stack([stats[name].to(tokens) for name in names] + [torch.ones_like(tokens)])
        sums = self._reduce((values * tokens).masked_fill(tokens == 0, 0.0))
        return stats | dict(zip(names, sums[:-1] / sums[-1], strict=True))

    def _stops_early(self, policy_kl: float) -> bool:
        """Whether early stopping ends the passes over this batch."""
        return self.config.early_stopping and policy_kl > 1.5 * float(self.config.target_kl or 0)

    # Statistics ------------------------------------------------------------------------------------------------------

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over processes."""
        return sum_over_processes(self.accelerator, tensor)

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Computes the statistics of a step. Every process must call this.

        Args:
            kl_coef: KL coefficient used in this step's rewards.
            **data: scores, logprobs, ref_logprobs, non_score_reward, masks [B, S], queries, responses, train_stats.

        Returns:
            Statistics by name: scalars cover all processes, arrays only this one.
        """
        scores = data["scores"]
        return step_statistics(
            kl_coef=kl_coef,
            scores=scores if isinstance(scores, Tensor) else torch.stack(list(scores)).float(),
            logprobs=data["logprobs"],
            ref_logprobs=data["ref_logprobs"],
            non_score_reward=data["non_score_reward"],
            mask=data["masks"].bool(),
            queries=data["queries"],
            responses=data["responses"],
            train_stats=data["train_stats"],
            reduce=self._reduce,
        )

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Averages scalar tensors over processes, such as those you add in `record_step_stats`; arrays stay local."""
        if not self.is_distributed:
            return stats
        names = [k for k, v in stats.items() if isinstance(v, Tensor) and v.dim() == 0]
        packed = torch.stack([stats[name].to(self.current_device).float() for name in names])
        means = self._reduce(packed) / self.accelerator.num_processes
        return stats | dict(zip(names, means, strict=True))

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Logs statistics, score moments and a table of completions to the tracker, on the main process.

        If `rewards` are the scores passed to the last `step`, `env/reward_*` cover all processes. The table shows only
        the main process's completions.

        Args:
            stats: statistics returned by `step`.
            batch: texts by column name. If a column of `columns_to_log` is missing, warns and logs no table.
            rewards: `B` scores.
            columns_to_log: columns shown in the table next to the score.
        """
        if not self.accelerator.is_main_process:
            return
        flat = torch.as_tensor([float(r) for r in rewards])
        logs = dict(stats)
        if missing := [c for c in columns_to_log if c not in batch]:
            warnings.warn(f"the batch has no {missing}: no table of completions is logged", stacklevel=2)
        else:
            rows = list(zip(*(batch[c] for c in columns_to_log), flat.tolist(), strict=True))
            logs |= completions_table(self.config.log_with, [*columns_to_log, "reward"], rows)
        flat = self._of_all_processes(flat)
        logs["env/reward_mean"] = flat.mean().item()
        logs["env/reward_std"] = flat.std().item() if len(flat) > 1 else 0.0
        logs["env/reward_dist"] = flat.numpy()
        self.current_step += 1
        self.accelerator.log(logs, step=self.current_step)

    def _of_all_processes(self, scores: Tensor) -> Tensor:
        """Scores of all processes `[n · B]`, given this process's `scores` [B], as gathered by `step`.

        Gathering here would hang if a script calls `log_stats` only on the main process.
        """
        if not self.is_distributed:
            return scores
        if self._scores_of_step is not None and torch.equal(scores, self._scores_of_step[0]):
            return self._scores_of_step[1]
        warnings.warn(
            "log_stats was given other rewards than step's scores: env/reward_* are of the main process alone",
            stacklevel=3,
        )
        return scores


def _stacked(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Like `stack_updates`, for dicts of tensors."""
    stacked = {}
    for name in history[0]:
        column = [stats[name] for stats in history]
        if column[0].dim() < 2 and column[0].numel() == 1:
            stacked[name] = torch.stack([x.reshape(()).float().cpu() for x in column])
        else:
            stacked[name] = torch.cat([x.flatten() for x in column]).unsqueeze(0)
    return stacked
