"""PPO behind one call: `stats = ppo_trainer.step(queries, responses, scores)`."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from trl.algorithms.ppo import ppo_loss, ppo_minibatches
from trl.core import PPODecorators, convert_to_scalar, set_seed, stats_to_np
from trl.data import PadCollator
from trl.functional import Moments, gae, masked_sum, masked_whiten
from trl.kernels.allocator import keep_freed_memory
from trl.models import PreTrainedModelWrapper, RolloutAboveFrozen, create_reference_model, shares_frozen
from trl.models.adapters import adapter_starts_at_zero, check_adapters_on, frozen_copy, reference_mode
from trl.models.limits import context_length, decoder_start, vocabulary_sizes
from trl.models.recompute import recompute_activations
from trl.models.reference import check_reference
from trl.protocols import Callback, Tracker
from trl.redaction import remember_secrets
from trl.rollout import stop_tokens
from trl.runs.managed import train
from trl.runs.options import OnDiskError, OnSpike, TrainOptions, TrainResult
from trl.runs.spikes import SpikeSettings
from trl.state.checkpoints import Checkpoint
from trl.state.fingerprints import Fingerprints
from trl.trainer.checks import (
    check_lists,
    check_logprobs,
    check_per_token,
    check_room,
    check_scores,
    check_start,
    check_tokens,
)
from trl.trainer.kl_controllers import controller_for
from trl.trainer.live_settings import LiveSettings
from trl.trainer.policy_sampler import PolicySampler
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.ppo_methods import PPOMethods
from trl.trainer.tracking import check_trackers, settings_to_track
from trl.training.batch import Batch
from trl.training.batched import evaluate_in_batches, exact_kl_of, with_frozen_states
from trl.training.compiling import compile_passes
from trl.training.compute import Compute
from trl.training.guards import UpdateGuards
from trl.training.loop import optimize
from trl.training.modes import eval_mode
from trl.training.optimizers import check_optimizer, check_scheduler, group_settings, inner, make_adam, unheld
from trl.training.peak import memory_statistics
from trl.training.processes import check_same, gather_over_processes, make_accelerator, whole_gradients
from trl.training.resume import load_training, save_training, settings_of
from trl.training.scores import ScoreSettings, ends_with, shape_scores
from trl.training.statistics import pooled_mean, stack_updates
from trl.types import ActorCritic, Evaluation, Rollout, Tally

logger = logging.getLogger(__name__)
# Settings that may differ between processes: names, and the seed of a loop of the user's own.
_MAY_DIFFER = ("seed", "task_name", "model_name", "tracker_project_name")
# Keys that `prepare_model_inputs` may return: those that forward passes read, and what language-model collators add.
_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An evaluated batch: what `prepare` returns and `learn` takes."""

    batch: Batch
    scores: list[Tensor]  # B raw scores, as given to `step`
    experience: ActorCritic
    entropy: Tensor | None  # [B, S] policy entropy before the update
    non_score_reward: Tensor  # [B, S]
    score_moments: Moments  # of this batch's scores alone
    kl_coef: float  # KL coefficient in the rewards
    temperature: float  # of the log-probabilities
    frozen: list[tuple[int, int]]  # identity and version of each frozen parameter, behind cached states of layers
    counted: list[bool]  # B: False where an all-zero response mask excludes the sample
    rows: int  # samples that count, over all processes
    kl: Tensor  # [B] KL to the reference before the update
    timing: dict[str, float]  # seconds by statistics key
    seconds: float  # total time of `prepare`


class PPOTrainer(PPOMethods):
    """Trains a language model with a value head using proximal policy optimisation (PPO).

    Follows Ziegler et al. 2019 (arXiv:1909.08593): PPO (Schulman et al. 2017, arXiv:1707.06347) on one score per
    response, minus a KL penalty that keeps the policy close to a reference model.

    Args:
        config: settings. Changes to it apply from the next call, except for what the trainer is built from (seed,
            trackers, accelerator, dtype, memory, compile); changing those has no effect and warns.
        model: policy with a value head. For a PEFT model, only the adapter and the value head are trained.
        ref_model: frozen reference model. If None: for a PEFT model whose adapter starts at zero, the model with the
            adapter disabled; otherwise a frozen copy of `model`.
        tokenizer: the model's tokenizer. Without a pad token, eos is used for padding; this is safe because masks come
            from lengths.
        dataset: optional prompts, batched by `self.dataloader`.
        optimizer: defaults to Adam at `config.learning_rate`.
        data_collator: turns a list of examples from `dataset` into a batch.
        num_shared_layers: number of layers shared by policy and reference, frozen in both.
        lr_scheduler: learning-rate scheduler, stepped once per call to `step`, without arguments.

    Raises:
        ValueError: if an argument has the wrong type, if settings other than seed and names differ between processes, if
            `optimizer` holds none of the model's trainable parameters, or if `lr_scheduler` needs a metric at each step.
    """

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
    ) -> None:
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config must be a PPOConfig, not {type(config).__name__}")
        if not isinstance(model, PreTrainedModelWrapper):
            raise ValueError(
                f"model must have a value head, not be a {type(model).__name__}: load it with "
                "AutoModelForCausalLMWithValueHead or AutoModelForSeq2SeqLMWithValueHead"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch optimizer, not {type(optimizer).__name__}")
        if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
            raise ValueError(f"lr_scheduler must be a torch learning-rate scheduler, not {type(lr_scheduler).__name__}")
        if optimizer is not None:
            check_optimizer(optimizer, model)
        if lr_scheduler is not None:
            check_scheduler(lr_scheduler, optimizer)
        config.validate()
        remember_secrets(vars(config))
        check_trackers(config)
        set_seed(int(config.seed or 0))
        super().__init__(config)
        self.tokenizer = tokenizer
        self.is_encoder_decoder = bool(model.is_encoder_decoder)
        self.is_peft_model = bool(model.is_peft_model)
        self.accelerator = make_accelerator(
            log_with=config.log_with,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        self.is_distributed = self.accelerator.num_processes > 1
        check_same(self.accelerator, {k: v for k, v in settings_of(config).items() if k not in _MAY_DIFFER})
        if config.keep_memory and self.accelerator.device.type == "cpu":
            keep_freed_memory()
        if config.log_with is not None:
            self.accelerator.init_trackers(
                config.tracker_project_name,
                config=settings_to_track(config),
                init_kwargs=dict(config.tracker_kwargs),
            )
        reference = self._make_reference(model, ref_model, num_shared_layers)
        self.dataset = dataset
        self.data_collator = PadCollator(tokenizer)
        if dataset is None:
            warnings.warn(
                "no dataset is given: trainer.dataloader is None, and step takes what you give it", stacklevel=2
            )
        self._forward_columns = list(inspect.signature(model.forward).parameters)
        loader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        trained = [p for p in model.parameters() if p.requires_grad]
        if narrow := {str(p.dtype) for p in trained if p.dtype in (torch.bfloat16, torch.float16)}:
            logger.warning(
                "the trained weights are %s: an update smaller than their spacing is lost%s. For half-precision compute with "
                "float32 weights, load them in float32 and set accelerator_kwargs={'mixed_precision': 'bf16'}",
                ", ".join(sorted(narrow)),
                ", and Adam's second moment underflows to 0, which makes its updates far too large"
                if str(torch.float16) in narrow
                else "",
            )
        own_optimizer = optimizer is None
        if optimizer is None:
            optimizer = make_adam(
                trained, float(config.learning_rate or 0), narrow=config.optimizer_state_dtype != "float32"
            )
        elif config.optimizer_state_dtype != "float32":
            raise ValueError(
                f"optimizer_state_dtype={config.optimizer_state_dtype!r} is for the Adam that the trainer makes, not for the "
                f"{type(optimizer).__name__} that is given"
            )
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, loader, lr_scheduler
        )
        self._optimizer_made_with = group_settings(inner(self.optimizer))
        self._left_out = dict(unheld(self.optimizer, self.model))  # known to the caller, so no warning
        self.compute = Compute(self.model, config.dtype, self.accelerator)
        if reference is not None:
            self.compute.adopt_reference(reference, model)
        self.ref_model = None if reference is None else self.accelerator.prepare_model(reference, evaluation_mode=True)
        if config.gradient_checkpointing:
            recompute_activations(self.model)
        if config.compile:
            quick, self.compute.quick_products = self.compute.quick_products, False
            code = compile_passes(self.model, self.ref_model, self.compute.fresh_passes, narrow=self.compute.narrow)
            self.compute.quick_products = quick and code.off
        self.kl_ctl = controller_for(config)
        self._live_settings = LiveSettings(config, rate_is_ours=own_optimizer and lr_scheduler is None)
        self.current_device = self.accelerator.device
        self.current_step = 0
        self.score_moments = Moments()
        self._generator = torch.Generator().manual_seed(int(config.seed or 0))
        self._highest_score = float("-inf")
        self._compared = 0
        self._steps_done = 0
        self.guards = UpdateGuards()
        self.last_experience: ActorCritic | None = None
        """Experience of the last `step`: per-token rewards, values and advantages from before its update."""
        self.fingerprints = Fingerprints()
        self._sampler = PolicySampler(self.accelerator, self.compute, self.data_collator)

    # Sampling --------------------------------------------------------------------------------------------------------

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        **generation_kwargs: Any,
    ) -> Tensor | list[Tensor]:
        """Samples responses with trl's own decoding loop, falling back to transformers' `generate` where needed.

        Each token uses one random number from a generator seeded by torch's global one, so `set_seed` reproduces the
        responses whatever the batch size.

        Args:
            query_tensor: one query [Q], or a list of them.
            length_sampler: draws `max_new_tokens`, once per `batch_size` queries.
            batch_size: queries sampled together; our own loop may take more where memory allows.
            return_prompt: prepend the query to the response (decoder-only models).
            **generation_kwargs: arguments of transformers' `generate`. Those that change the sampling distribution
                trigger a warning.

        Returns:
            `[1, R]` for a single query, else a list of 1-D responses. A sampled stop token is kept; an
            encoder-decoder's response begins with the decoder's start token.

        Raises:
            ValueError: if a query is not a 1-D tensor of valid token ids, if query and response might not fit into the
                model's context, or if the arguments do not ask for exactly one response per query.
        """
        return self._sampler.generate(
            self.model,
            query_tensor,
            generation_kwargs,
            length_sampler=length_sampler,
            batch_size=batch_size,
            return_prompt=return_prompt,
            temperature=self.config.temperature,
            remember=self.config.score_while_sampling,
        )

    def _recalled(self, batch: Batch) -> Evaluation | None:
        """What the engine saw in `generate`, in place of a scoring pass; None unless every process has its whole batch."""
        if not self.config.score_while_sampling:
            return None
        seen = self._sampler.recall(self.model, batch.queries, batch.responses, self.config.temperature)
        if seen is None:
            return None
        # The decoder's start token was not sampled, so it has no log-probability or value.
        start = [v.new_zeros(1) for v in seen[0]] if self.is_encoder_decoder else None
        placed = [
            self._placed(part if start is None else [torch.cat(pair) for pair in zip(start, part, strict=True)], batch)
            for part in seen
        ]
        return Evaluation(logprobs=placed[0], values=placed[1], entropy=None)

    # One step --------------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        token_rewards: list[Tensor] | None = None,
        sampler_logprobs: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Runs one PPO step: evaluates policy and reference, computes advantages, optimises for `ppo_epochs` epochs.

        Args:
            queries: `batch_size` 1-D tensors of token ids.
            responses: `batch_size` 1-D tensors of at least one token; for an encoder-decoder, the decoder's start token
                and at least one more.
            scores: `batch_size` single-element tensors.
            response_masks: one mask per response: 1 for tokens generated by the policy, 0 for tokens from elsewhere,
                such as tool output, which serve as context but are not trained on. An all-zero mask excludes the sample
                from the update, the running moments and all statistics except the lengths. Pass it on every process or
                on none.
            token_rewards: one tensor per response with a reward for each token, added to the score.
            sampler_logprobs: one tensor per response with the log-probability of each token under the distribution that
                sampled it, if that was not the policy. The policy loss is then weighted by
                min(π_old / π_sampler, importance_cap).

        Returns:
            Statistics by name: floats, and arrays for distributions (docs/ppo.md lists them).

        Raises:
            ValueError: if an argument is invalid; nothing has been changed.
            NonFiniteError: after `config.max_skipped_updates` consecutive non-finite optimizer steps.
        """
        return self.learn(self.prepare(queries, responses, scores, response_masks, token_rewards, sampler_logprobs))

    def prepare(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        token_rewards: list[Tensor] | None = None,
        sampler_logprobs: list[Tensor] | None = None,
    ) -> Prepared:
        """First half of `step`: evaluates policy and reference and computes advantages, without updating anything.

        Takes the arguments of `step` and raises the same errors. To skip a batch, do not pass the result to `learn`.
        """
        self._begin_call()
        started = time.perf_counter()
        timing: dict[str, float] = {}
        queries, responses, scores = self._step_safety_checker(
            int(self.config.batch_size or 1), queries, responses, scores
        )
        self._check_extras(responses, response_masks, token_rewards, sampler_logprobs)
        counted = [response_masks is None or bool(m.any()) for m in response_masks or responses]
        rows = self._rows_that_count(counted, anything_masked=response_masks is not None)
        with _timed(timing, "time/ppo/forward_pass"):
            batch = Batch(queries, responses, self.prepare_model_inputs(queries, responses))
            rollout = self._with_extras(self._rollout(batch), batch, response_masks, sampler_logprobs)
            rollout, old, ref_logprobs, exact_kl = self._evaluate(rollout, batch)
        if self._is_overridden("batched_forward_pass"):
            rows = self._rows_that_count(rollout.mask.any(dim=1).tolist(), anything_masked=True)
        with _timed(timing, "time/ppo/compute_rewards"):
            per_token = {} if exact_kl is None else {"kl": exact_kl}
            if token_rewards is not None:
                per_token["token_rewards"] = self._placed(token_rewards, batch)
            kl_coef = self.kl_ctl.value
            experience, non_score_reward, moments = self._experience(
                rollout, old, ref_logprobs, scores, responses, per_token
            )
        return Prepared(
            batch=batch,
            scores=scores,
            experience=experience,
            entropy=old.entropy,
            non_score_reward=non_score_reward,
            score_moments=moments,
            kl_coef=kl_coef,
            temperature=self.config.temperature,
            frozen=self._frozen_versions(),
            counted=counted,
            rows=rows,
            kl=masked_sum(old.logprobs - ref_logprobs, rollout.mask, dim=1),
            timing=timing,
            seconds=time.perf_counter() - started,
        )

    def learn(self, prepared: Prepared) -> dict[str, Any]:
        """Second half of `step`: optimises on a batch from `prepare` and returns the step's statistics.

        Batches may be learnt later and in any order: rewards and advantages stay those of `prepare`, except where an
        overridden `loss` computes advantages of its own.

        Raises:
            ValueError: if a setting is invalid, or `config.temperature` is not that of `prepare`.
            NonFiniteError: as `step`.
        """
        self._begin_call()
        if prepared.temperature != self.config.temperature:
            raise ValueError(
                f"temperature={self.config.temperature} was {prepared.temperature} when the batch was prepared, and so are its "
                "log-probabilities: prepare it again"
            )
        with PPODecorators.empty_cuda_cache(self.config.optimize_cuda_cache), whole_gradients(self.accelerator):
            started = time.perf_counter()
            batch, experience, timing = prepared.batch, prepared.experience, dict(prepared.timing)
            rollout = experience.rollout
            if isinstance(rollout, RolloutAboveFrozen):
                rollout = rollout.without_states()
            if prepared.frozen != self._frozen_versions():  # cached states of layers that have changed, or learn now
                experience = replace(experience, rollout=rollout)
            self._push_if_best([score for score, keep in zip(prepared.scores, prepared.counted, strict=True) if keep])
            self.score_moments += prepared.score_moments
            with _timed(timing, "time/ppo/optimize_step"):
                self._sampler.weights_changed()
                train_stats = self._optimize(experience, batch)
            self.last_experience = replace(experience, rollout=rollout)
            with _timed(timing, "time/ppo/calc_stats"):
                stats = self.record_step_stats(
                    kl_coef=prepared.kl_coef,
                    scores=prepared.scores,
                    logprobs=experience.old_logprobs,
                    ref_logprobs=experience.ref_logprobs,
                    non_score_reward=prepared.non_score_reward,
                    train_stats=train_stats,
                    masks=rollout.mask,
                    queries=batch.queries,
                    responses=batch.responses,
                )
                stats |= self._extra_stats(experience, prepared.entropy)
                local_scores = torch.stack(prepared.scores)
                all_scores = gather_over_processes(self.accelerator, local_scores)
                self._scores_of_step = (local_scores.cpu(), all_scores.cpu())
                stats = stats_to_np(convert_to_scalar(self.gather_stats(stats)))
            rate = self.optimizer.param_groups[0]["lr"]
            stats["ppo/learning_rate"] = math.nan if rate is None else float(rate)  # Adafactor may make its own
            self.kl_ctl.update(stats["objective/kl"], prepared.rows)
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self._steps_done += 1
            timing["time/ppo/total"] = prepared.seconds + time.perf_counter() - started
            return stats | timing | memory_statistics(self.current_device)

    def _frozen_versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.model.parameters() if not p.requires_grad]

    def _begin_call(self) -> None:
        """Takes up changed settings, and checks that the model can be trained as it is now."""
        self.config.validate()
        self.kl_ctl = self._live_settings.follow(self.config, self.optimizer, self.kl_ctl)
        self._warn_of_unheld()
        if self.is_peft_model:
            check_adapters_on(self.model)

    def _evaluate(self, rollout: Rollout, batch: Batch) -> tuple[Rollout, Evaluation, Tensor, Tensor | None]:
        """Evaluates policy and reference before the update.

        Returns:
            The rollout, with cached states of the frozen layers where these apply; the policy's evaluation; the
            reference's logprobs [B, S]; and the exact KL [B, S] for `kl_penalty="full"`, else None.
        """
        size, temperature = int(self.config.mini_batch_size or 1), self.config.temperature
        overridden = self._is_overridden("batched_forward_pass")
        theirs: list[Tensor] = []  # masks returned by an overridden batched_forward_pass, the policy's first
        if not overridden and (unread := sorted(set(batch.inputs) - _INPUTS)):
            raise ValueError(
                f"prepare_model_inputs returned {', '.join(unread)}, which passes do not read: override batched_forward_pass as "
                "well, or leave it out"
            )

        def evaluated(model: nn.Module, rollout: Rollout, policy: bool) -> Evaluation:
            if overridden:
                logprobs, _, values, masks = self.batched_forward_pass(
                    model, batch.queries, batch.responses, batch.inputs
                )
                theirs.append(masks.bool())
                return Evaluation(logprobs=logprobs, values=values, entropy=None)
            return evaluate_in_batches(
                model, rollout, batch_size=size, temperature=temperature, entropy=policy, values=policy
            )

        exact = None
        # If the update runs through overridden methods, evaluation uses the weights as stored, as the update does.
        own_way = self._is_overridden("loss", "train_minibatch", "batched_forward_pass")
        recalled = None if overridden or own_way else self._recalled(batch)
        passes = nullcontext() if own_way else self.compute.fresh_passes()
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        with torch.no_grad(), eval_mode(*models), passes:
            if not own_way:
                rollout = with_frozen_states(self.model, rollout, batch_size=size, autocast=self.accelerator.autocast)
            old = recalled or evaluated(self.model, rollout, policy=True)
            with self._reference() as reference:
                common = rollout
                if isinstance(rollout, RolloutAboveFrozen) and not shares_frozen(self.model, reference, rollout.depth):
                    common = rollout.without_states()
                ref_logprobs = evaluated(reference, common, policy=False).logprobs
            if self.config.kl_penalty == "full":
                with self.accelerator.autocast():
                    exact = exact_kl_of(self.model, self._reference, common, batch_size=size, temperature=temperature)
        if theirs:
            foreign = self._rollout(batch).mask & ~rollout.mask  # masked out by response_masks
            rollout = replace(rollout, mask=theirs[0] & ~foreign)
        return rollout, old, ref_logprobs, exact

    def reference_kl(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        """KL to the reference, `[B]`: log p - log p_ref in nats, summed over each response's tokens.

        Takes queries and responses as `step` does and updates nothing.
        """
        local = [[t.to(self.current_device) for t in tokens] for tokens in (queries, responses)]
        batch = Batch(local[0], local[1], self.prepare_model_inputs(local[0], local[1]))
        rollout, old, ref_logprobs, _ = self._evaluate(self._rollout(batch), batch)
        return masked_sum(old.logprobs - ref_logprobs, rollout.mask, dim=1)

    def _experience(
        self,
        rollout: Rollout,
        old: Evaluation,
        ref_logprobs: Tensor,
        scores: list[Tensor],
        responses: list[Tensor],
        per_token: Mapping[str, Tensor],
    ) -> tuple[ActorCritic, Tensor, Moments]:
        """Turns scores into rewards and rewards into advantages.

        Returns:
            The experience, the non-score part of the rewards [B, S], and the moments of this batch's scores alone.
        """
        assert old.values is not None
        config = self.config
        shaped, moments = shape_scores(
            torch.stack(scores).to(old.logprobs),
            ends_with(responses, self._stop_tokens()).to(old.logprobs.device),
            self.score_moments,
            ScoreSettings(
                missing_eos_penalty=config.missing_eos_penalty,
                scale=config.use_score_scaling,
                center=config.use_score_norm,
                clip=config.score_clip,
            ),
            self._reduce,
            rollout.mask.any(dim=1),
        )
        rewards, non_score_reward = self.compute_rewards(
            shaped, old.logprobs, ref_logprobs, rollout.mask.long(), **per_token
        )
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.mask, shift_mean=False, reduce=self._reduce)
        advantages, returns = gae(
            rewards, old.values, rollout.mask, gamma=float(config.gamma or 0), lam=float(config.lam or 0)
        )
        experience = ActorCritic(
            rollout=rollout,
            scores=shaped,
            old_logprobs=old.logprobs,
            ref_logprobs=ref_logprobs,
            old_values=old.values,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
        )
        return experience, non_score_reward, moments

    def _optimize(
        self,
        experience: ActorCritic,
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Updates the policy; returns the training statistics, one row per optimizer step."""
        config = self.config
        alone = config.samples_per_update == 1 < len(experience) and not self.is_distributed
        if alone and int(experience.rollout.mask.sum(dim=1).max()) == 1:
            warnings.warn(
                "every optimizer step sees a single token: whitened, its advantage is 0, and the policy learns nothing. Set "
                "mini_batch_size * gradient_accumulation_steps above 1",
                stacklevel=3,
            )
        if self._is_overridden("loss", "train_minibatch", "batched_forward_pass"):
            return self._optimize_by_methods(experience, batch)
        history = optimize(
            ppo_minibatches(
                experience,
                size=config.samples_per_update,
                epochs=int(config.ppo_epochs or 1),
                generator=self._generator,
                denominator=config.loss_denominator,
                reduce=self._reduce,
            ),
            ppo_loss(self.model, self._settings()),
            self._updater(),
            microbatch_size=int(config.mini_batch_size or 1),
            reduce=self._reduce,
            stop=lambda metrics: self._stops_early(metrics.means["policy/policykl"]),
        )
        return stack_updates(history)

    # What a step needs to know ---------------------------------------------------------------------------------------

    def _is_overridden(self, *names: str) -> bool:
        """Whether a subclass or this instance overrides any of these methods."""
        return any(name in vars(self) or getattr(type(self), name) is not getattr(PPOMethods, name) for name in names)

    def _make_reference(
        self, model: PreTrainedModelWrapper, ref_model: Any, num_shared_layers: int | None
    ) -> PreTrainedModelWrapper | None:
        """Reference model for the KL; None if it is `model` with its adapter disabled."""
        if ref_model is not None:
            if not isinstance(ref_model, PreTrainedModelWrapper):
                raise ValueError(
                    f"ref_model must have a value head, not be a {type(ref_model).__name__}: make it with "
                    "create_reference_model(model)"
                )
            check_reference(ref_model, model)
            if num_shared_layers is not None:
                warnings.warn(
                    f"num_shared_layers={num_shared_layers} is ignored, since a ref_model is given", stacklevel=3
                )
            return ref_model
        if not self.is_peft_model:
            return create_reference_model(model, num_shared_layers=num_shared_layers)
        if num_shared_layers is not None:
            warnings.warn(
                f"num_shared_layers={num_shared_layers} is ignored: with an adapter, the reference is the model without it",
                stacklevel=3,
            )
        if adapter_starts_at_zero(model):
            return None
        logger.warning(
            "the adapter is not at zero at the start, so that the model without it is not where training starts: the "
            "reference is a frozen copy of the whole model"
        )
        return frozen_copy(model)

    def _reference(self) -> AbstractContextManager[nn.Module]:
        if self.ref_model is None:
            return reference_mode(self.model)
        return nullcontext(self.ref_model)

    def _stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a response: `config.stop_token_ids`, or those of the model and tokenizer."""
        if self.config.stop_token_ids is not None:
            return tuple(self.config.stop_token_ids)
        model = self.accelerator.unwrap_model(self.model)
        stops = set(stop_tokens(model.generation_config, {}))
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        return tuple(sorted(stops))

    def _step_safety_checker(
        self, batch_size: int | None, queries: list[Tensor], responses: list[Tensor], scores: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Validates the arguments of `step` and copies them to the model's device.

        Raises:
            ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        check_lists(batch_size, queries=queries, responses=responses, scores=scores)
        reads, writes = vocabulary_sizes(self.model)
        context = context_length(self.model)  # for an encoder-decoder, the decoder's
        check_tokens("queries", queries, vocabulary=reads)
        check_tokens("responses", responses, vocabulary=writes, least=2 if self.is_encoder_decoder else 1)
        if self.is_encoder_decoder:
            check_start(responses, decoder_start(self.model))
            check_room([len(q) for q in queries], context_length(self.model, encoder=True), "the query")
            check_room([len(r) for r in responses], context, "the response")
        else:
            lengths = [len(q) + len(r) for q, r in zip(queries, responses, strict=True)]
            check_room(lengths, context, "query + response")
        flat = check_scores(scores)
        device = self.current_device  # copies: a prepared batch outlives buffers that the caller fills anew
        q, r, s = ([tensor.to(device, copy=True) for tensor in given] for given in (queries, responses, flat))
        return q, r, s

    def _check_extras(
        self,
        responses: list[Tensor],
        response_masks: list[Tensor] | None,
        token_rewards: list[Tensor] | None,
        sampler_logprobs: list[Tensor] | None,
    ) -> None:
        for name, values in (
            ("response_masks", response_masks),
            ("token_rewards", token_rewards),
            ("sampler_logprobs", sampler_logprobs),
        ):
            if values is not None:
                check_lists(len(responses), **{name: values})
                check_per_token(name, values, responses)
        check_logprobs(sampler_logprobs or [])
        for i, mask in enumerate(response_masks or []):
            # All zeros excludes the sample; but a mask that keeps only the start token leaves nothing to train on.
            if mask.any() and not mask[int(self.is_encoder_decoder) :].any():
                raise ValueError(f"response_masks[{i}] leaves the decoder's start token alone, which is not trained on")

    def _rows_that_count(self, counted: Sequence[bool], anything_masked: bool) -> int:
        """Number of samples that count, over all processes.

        Raises:
            ValueError: if none counts.
        """
        if not anything_masked:
            return len(counted) * self.accelerator.num_processes
        kept = int(self._reduce(torch.tensor(sum(counted), dtype=torch.float32, device=self.current_device)))
        if kept == 0:
            raise ValueError("response_masks leave every sample out, on every process: there is nothing to learn from")
        return kept

    def _with_extras(
        self,
        rollout: Rollout,
        batch: Batch,
        response_masks: list[Tensor] | None,
        sampler_logprobs: list[Tensor] | None,
    ) -> Rollout:
        """Applies `response_masks` to the rollout's mask and attaches `sampler_logprobs`."""
        if response_masks is not None:
            own = self._placed([m != 0 for m in response_masks], batch)
            rollout = replace(rollout, mask=rollout.mask & own.bool())
        if sampler_logprobs is not None:
            seen = self._placed(sampler_logprobs, batch)
            rollout = replace(rollout, sampler_logprobs=seen)
        return rollout

    def _extra_stats(self, experience: ActorCritic, entropy: Tensor | None) -> dict[str, Tensor]:
        """Statistics beyond those of TRL 0.4.6, over all processes; `entropy` is [B, S], before the update."""
        stats, mask, seen = {}, experience.rollout.mask, experience.rollout.sampler_logprobs
        if entropy is not None:
            total = Tally(masked_sum(entropy, mask), mask.any(dim=1).sum())
            stats["objective/full_entropy"] = pooled_mean(total, self._reduce)
        if seen is not None:
            gap = (experience.old_logprobs - seen).abs()
            stats["objective/sampler_gap"] = pooled_mean(Tally.of(gap, mask), self._reduce)
        return stats

    def _warn_of_unheld(self) -> None:
        """Warns about parameters that became trainable after the optimizer was built."""
        now = unheld(self.optimizer, self.model)
        if new := [name for name, p in now.items() if self._left_out.get(name) is not p]:
            warnings.warn(
                f"{len(new)} parameters, such as {new[0]}, are to be trained since the trainer was made, but its optimizer does "
                "not hold them: they stay as they are. Make a new trainer, or trainer.optimizer.add_param_group",
                stacklevel=4,
            )
        self._left_out = now

    def _push_if_best(self, scores: list[Tensor]) -> None:
        kwargs = self.config.push_to_hub_if_best_kwargs
        if not kwargs:
            return
        if self._compared % int(self.config.compare_steps or 1) == 0:
            # float64, since the sum of finite float32 scores may overflow float32.
            total = torch.tensor([sum(map(float, scores)), len(scores)], dtype=torch.float64)
            mean = float(pooled_mean(Tally(*total.to(self.current_device)), self._reduce))
            if mean > self._highest_score:
                self._highest_score = mean
                self.push_to_hub(**kwargs)
        self._compared += 1

    # The loop ------------------------------------------------------------------------------------------------------------

    def train(
        self,
        prompts: Any,
        *,
        reward: Any,
        steps: int | None = None,
        episodes: int | None = None,
        run_dir: str | Path | None = None,
        resume: bool | Literal["auto"] = False,
        generation: Mapping[str, Any] | None = None,
        length_sampler: Callable[[], int] | None = None,
        eval_prompts: Any = None,
        eval_every: int | None = None,
        save_every: int | None = None,
        keep_last: int = 2,
        keep_best: bool = True,
        on_spike: OnSpike | None = "warn",
        spike: SpikeSettings | None = None,
        max_skipped_updates: int | None = 3,
        on_disk_error: OnDiskError = "stop",
        callbacks: Sequence[Callback] = (),
        trackers: Sequence[Tracker] = (),
        progress: bool | None = None,
    ) -> TrainResult:
        """Runs the full training loop (sample, score, learn), keeping records and checkpoints in a run folder.

        Each step takes `config.batch_size` prompts per process. docs/runs.md describes the folder and which failures a
        run survives.

        Args:
            prompts: anything `trl.data.load_prompts` accepts.
            reward: anything `trl.rewards.as_reward` accepts. Samples without a score are excluded from the update.
            steps: total steps of the run, including those before a resumption.
            episodes: total samples over all processes, as an alternative to `steps`; rounded up to whole steps.
            run_dir: run folder; None writes nothing.
            resume: "auto" resumes the run in `run_dir` or starts a new one; True requires an existing run; False
                requires that there is none. A run whose checkpoints were deleted cannot be resumed.
            generation: arguments of `generate`. By default, up to 64 new tokens from the distribution that the update
                scores.
            length_sampler: draws `max_new_tokens`, as in `generate`.
            eval_prompts: held-out prompts, sampled and scored like the others, with the same random numbers each time.
            eval_every: steps between evaluations; by default 20 evaluations per run. The last step is always evaluated.
            save_every: steps between checkpoints. None saves as often as keeps the cost below 1% of the run time, at
                least every half hour, and after each new best evaluation. The last step is always saved.
            keep_last: number of recent checkpoints to keep.
            keep_best: also keep the best checkpoint, by `eval/score_mean`, or by `score/mean` without `eval_prompts`.
            on_spike: response to a spike in KL or loss. "warn" logs it; "skip" skips the batch (KL only, which is known
                before the update); "rollback" returns to the newest checkpoint due by `save_every` (by default 20 per
                run) and continues with the next prompts; None ignores it.
            spike: thresholds that define a spike.
            max_skipped_updates: consecutive non-finite optimizer steps before the run fails;
                `config.max_skipped_updates`, if set, takes precedence.
            on_disk_error: "stop" ends the run; "go_on" retries failed writes later.
            callbacks: see `trl.protocols.Callback`.
            trackers: see `trl.protocols.Tracker`. A tracker that fails or hangs loses its rows but never stops the run.
            progress: None shows a bar on a terminal (with rich) and plain lines elsewhere; False shows nothing.

        Raises:
            ValueError: if an argument is invalid, or `run_dir` holds a different run.
            CheckpointError: if no checkpoint can be read, or one cannot be written.
            OSError: if a record cannot be written.
            NonFiniteError: after `max_skipped_updates` consecutive non-finite optimizer steps.
            SpikeError: if spikes persist after three consecutive batches were skipped or rolled back.
            KeyboardInterrupt: on SIGINT, after the current step is finished and saved; a second SIGINT raises at once.
            SystemExit: on SIGTERM, likewise, with status 143.
        """
        arguments = {name: value for name, value in locals().items() if name != "self"}
        if type(self).step is not PPOTrainer.step:
            raise ValueError(
                f"{type(self).__name__} has a step of its own, which train does not call: it calls the two halves of step, "
                "prepare and learn. Override these, or write the loop around generate and step"
            )
        return train(self, TrainOptions(**arguments))

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State that PPO carries between steps, apart from model, optimizer and scheduler."""
        return {
            "kl_ctl": self.kl_ctl.state_dict(),
            "score_moments": asdict(self.score_moments),
            "minibatch_order": self._generator.get_state(),
            "steps_done": self._steps_done,
            "logged_steps": self.current_step,
            "highest_score": self._highest_score,
            "compared": self._compared,
            "consecutive_skips": self.guards.consecutive_skips,
            "largest_microbatch": self.guards.largest_microbatch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state returned by `state_dict`."""
        self._sampler.weights_changed()
        self.kl_ctl.load_state_dict(state["kl_ctl"])
        self.score_moments = Moments(**state["score_moments"])
        self._generator.set_state(state["minibatch_order"])
        self._steps_done = state["steps_done"]
        self.current_step = state["logged_steps"]
        self._highest_score = state["highest_score"]
        self._compared = state["compared"]
        self.guards.consecutive_skips = state["consecutive_skips"]
        self.guards.largest_microbatch = state["largest_microbatch"]

    def save_checkpoint(
        self,
        folder: str | Path,
        *,
        extra: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        metric: float | None = None,
    ) -> Path:
        """Saves everything needed to resume training. Call it on every process, between two calls to `step`.

        Args:
            folder: checkpoint folder of this run; must be shared by all processes.
            extra: your own JSON-serialisable data, such as a position in the dataset; `load_checkpoint` returns it in
                `.state["extra"]`.
            keep_last: number of recent checkpoints to keep, besides the one with the highest metric.
            metric: quality of this checkpoint; higher is better.

        Returns:
            Path of the new checkpoint.

        Raises:
            CheckpointError: if the checkpoint could not be written; the previous one is intact.
        """
        return save_training(self, folder, step=self._steps_done, extra=extra, keep_last=keep_last, metric=metric)

    def load_checkpoint(self, folder: str | Path) -> Checkpoint | None:
        """Restores the newest intact checkpoint in a folder. Call it on every process, before anything else.

        On the same machine with the same libraries and settings, training continues exactly as it would have without
        the interruption: bit for bit in float32 on a CPU (docs/runs.md gives the exact guarantee).

        Returns:
            The checkpoint, or None, with nothing changed, if the folder holds no checkpoint.

        Raises:
            ValueError: if the checkpoint belongs to a different run; each difference is named and nothing is changed.
            CheckpointError: if there are checkpoints but none can be read.
        """
        return load_training(self, folder)


@contextmanager
def _timed(timing: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timing[name] = time.perf_counter() - started
