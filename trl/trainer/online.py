"""`OnlineTrainer`: sample, score, learn, for any algorithm; `step` is one pass of it on given responses."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl.core import PPODecorators
from trl.functional import masked_sum
from trl.models import RolloutAboveFrozen
from trl.protocols import Algorithm
from trl.trainer.given import check_batch, check_extras, rows_of, scored_by_caller
from trl.trainer.policy_trainer import PolicyTrainer
from trl.trainer.ppo_config import PPOConfig
from trl.training.batch import Batch
from trl.training.evaluator import Evaluated, Evaluator
from trl.training.loop import Updater, optimize
from trl.training.peak import memory_statistics
from trl.training.processes import whole_gradients
from trl.training.setup import Recipe, Setup
from trl.training.statistics import pooled_mean, stack_updates
from trl.types import Evaluation, Experience, Rollout, Tally

logger = logging.getLogger(__name__)
# Settings that may differ between processes: names, and the seed of a loop of the user's own.
_MAY_DIFFER = ("seed", "task_name", "model_name", "tracker_project_name")
_TRAINER_COLUMNS = ("label", "query", "response")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An evaluated batch: what `prepare` returns and `learn` takes."""

    batch: Batch
    experience: Experience
    kl_coef: float | None  # KL coefficient in the rewards; None if they hold no KL
    temperature: float  # of the log-probabilities
    frozen: list[tuple[int, int]]  # identity and version of each frozen parameter, behind cached states of layers
    rows: int  # samples that count, over all processes
    timing: dict[str, float]  # seconds by statistics key
    seconds: float  # total time of `prepare`


class OnlineTrainer(PolicyTrainer):
    """Trains a language model on scores of its own responses, by an algorithm composed of functions.

    Args:
        config: settings of the run. Changes to it apply from the next call, except for what the trainer is built from
            (seed, trackers, accelerator, dtype, memory); changing those has no effect and warns. Settings that belong
            to PPO alone must keep their defaults: an algorithm has its own.
        model: policy: a transformers language model, or one with a value head, which is then not used. For a PEFT
            model, only the adapter is trained.
        ref_model: frozen reference model, if the algorithm uses one. If None: for a PEFT model whose adapter starts at
            zero, the model with the adapter disabled; otherwise a frozen copy of `model`.
        tokenizer: the model's tokenizer. Without a pad token, eos is used for padding; this is safe because masks come
            from lengths.
        dataset: optional prompts, batched by `self.dataloader`.
        optimizer: defaults to Adam at `config.learning_rate`.
        data_collator: turns a list of examples from `dataset` into a batch.
        num_shared_layers: number of layers shared by policy and reference, frozen in both.
        lr_scheduler: learning-rate scheduler, stepped once per call to `step`, without arguments.
        algorithm: such as `trl.algorithms.grpo()`.

    Raises:
        ValueError: if an argument has the wrong type, if settings other than seed and names differ between processes, if
            `optimizer` holds none of the model's trainable parameters, or if `lr_scheduler` needs a metric at each step.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: Any = None,
        ref_model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
        *,
        algorithm: Recipe | None = None,
    ) -> None:
        if algorithm is None and type(self) is OnlineTrainer:
            raise ValueError("algorithm must be given, such as trl.algorithms.grpo(); PPO has PPOTrainer")
        super().__init__(
            config, model, ref_model, tokenizer, dataset, optimizer, data_collator, num_shared_layers, lr_scheduler,
            algorithm=algorithm,
        )  # fmt: skip

    # One step --------------------------------------------------------------------------------------------------------

    def step(
        self,
        queries: list[Tensor] | None = None,
        responses: list[Tensor] | None = None,
        scores: list[Tensor] | None = None,
        response_masks: list[Tensor] | None = None,
        token_rewards: list[Tensor] | None = None,
        sampler_logprobs: list[Tensor] | None = None,
        *,
        rollout: Rollout | None = None,
    ) -> dict[str, Any]:
        """Runs one step: evaluates policy and reference, computes advantages, optimises for `ppo_epochs` epochs.

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
            rollout: what a `RolloutEngine` returned, in place of queries, responses and sampler_logprobs.

        Returns:
            Statistics by name: floats, and arrays for distributions (docs/ppo.md lists them).

        Raises:
            ValueError: if an argument is invalid; nothing has been changed.
            NonFiniteError: after `config.max_skipped_updates` consecutive non-finite optimizer steps.
        """
        return self.learn(
            self.prepare(queries, responses, scores, response_masks, token_rewards, sampler_logprobs, rollout=rollout)
        )

    def prepare(
        self,
        queries: list[Tensor] | None = None,
        responses: list[Tensor] | None = None,
        scores: list[Tensor] | None = None,
        response_masks: list[Tensor] | None = None,
        token_rewards: list[Tensor] | None = None,
        sampler_logprobs: list[Tensor] | None = None,
        *,
        rollout: Rollout | None = None,
        group: Sequence[int] | None = None,
    ) -> Prepared:
        """First half of `step`: evaluates policy and reference and computes advantages, without updating anything.

        Takes the arguments of `step` and raises the same errors. To skip a batch, do not pass the result to `learn`.

        Args:
            queries: as for `step`, like those down to `rollout`.
            responses: `B`.
            scores: `B`.
            response_masks: `B`, or None.
            token_rewards: `B`, or None.
            sampler_logprobs: `B`, or None.
            rollout: in place of queries, responses and sampler_logprobs.
            group: one number per response, equal for responses to one prompt; by default, equal for equal queries.
        """
        self._begin_call()
        started = time.perf_counter()
        timing: dict[str, float] = {}
        if rollout is not None:
            if not (queries is None and responses is None and sampler_logprobs is None):
                raise ValueError("give either rollout, or queries and responses")
            queries, responses, sampler_logprobs = rows_of(rollout)
            group = rollout.group.tolist()
        queries, responses, scores = self._step_safety_checker(
            int(self.config.batch_size or 1), queries, responses, scores
        )
        check_extras(
            responses, response_masks, token_rewards, sampler_logprobs, is_encoder_decoder=self.is_encoder_decoder
        )
        with _timed(timing, "forward_pass"):
            batch = self._batch(queries, responses)
            rollout = batch.rollout(
                policy_version=self._steps_done,
                group=None if group is None else torch.tensor(group),
                response_masks=response_masks,
                sampler_logprobs=sampler_logprobs,
            )
        rows = self._rows_that_count(rollout)
        scored = scored_by_caller(scores, token_rewards, skip=int(self.is_encoder_decoder))
        evaluate = _Timed(self._evaluation(batch, self._evaluator(self._recalled(batch))))
        with _timed(timing, "compute_rewards"):
            experience = self._algorithm(evaluate).experience(rollout, scored)
        timing["forward_pass"] += evaluate.seconds
        timing["compute_rewards"] -= evaluate.seconds
        return Prepared(
            batch=batch,
            experience=experience,
            kl_coef=self.kl_ctl.value if self.recipe is None else None,
            temperature=self.config.temperature,
            frozen=self._frozen_versions(),
            rows=rows,
            timing={f"time/{self.name}/{part}": seconds for part, seconds in timing.items()},
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
            experience, timing = prepared.experience, dict(prepared.timing)
            rollout = experience.rollout
            if isinstance(rollout, RolloutAboveFrozen):
                rollout = rollout.without_states()
            if prepared.frozen != self._frozen_versions():  # cached states of layers that have changed, or learn now
                experience = replace(experience, rollout=rollout)
            self._before_update(experience)
            with _timed(timing, f"time/{self.name}/optimize_step"):
                self._sampler.weights_changed()
                train_stats = self._update(experience, prepared.batch)
            self.last_experience = replace(experience, rollout=rollout)
            with _timed(timing, f"time/{self.name}/calc_stats"):
                stats = self._statistics(experience, prepared.batch, prepared.kl_coef, train_stats)
            rate = self.optimizer.param_groups[0]["lr"]
            # An optimizer such as Adafactor may make a rate of its own.
            stats[f"{self.name}/learning_rate"] = math.nan if rate is None else float(rate)
            self._after_update(stats, prepared.rows)
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
            self._steps_done += 1
            timing[f"time/{self.name}/total"] = prepared.seconds + time.perf_counter() - started
            return stats | timing | memory_statistics(self.current_device)

    def _evaluator(self, known: Evaluation | None = None) -> Evaluator:
        """Evaluates rollouts at the current settings; `known` is the policy's evaluation, if sampling has computed it."""
        return Evaluator(
            policy=self.model,
            ref_model=self.ref_model,
            compute=self.compute,
            accelerator=self.accelerator,
            batch_size=int(self.config.mini_batch_size or 1),
            temperature=self.config.temperature,
            known=known,
            values=self.recipe is None,
            compare=self._compares,
        )

    def _evaluation(self, batch: Batch, evaluator: Evaluator) -> Callable[[Rollout], Evaluated]:
        """How the rollout of `batch` is evaluated: by `evaluator`, unless a subclass has a way of its own."""
        return evaluator

    def _setup(self, evaluate: Callable[[Rollout], Evaluated]) -> Setup:
        config = self.config
        return Setup(
            policy=self.model,
            evaluate=evaluate,
            generator=self._generator,
            temperature=config.temperature,
            size=config.samples_per_update,
            epochs=int(config.ppo_epochs or 1),
            denominator=config.loss_denominator,
            reduce=self._reduce,
        )

    def _algorithm(self, evaluate: Callable[[Rollout], Evaluated]) -> Algorithm:
        """The algorithm at the current settings."""
        assert self.recipe is not None
        return self.recipe.bind(self._setup(evaluate))

    def _update(self, experience: Experience, batch: Batch) -> dict[str, Tensor]:
        """Updates the policy; returns the training statistics, one row per optimizer step."""
        algorithm = self._algorithm(self._evaluator())
        history = optimize(
            algorithm.minibatches(experience),
            algorithm.loss,
            self._updater(),
            microbatch_size=int(self.config.mini_batch_size or 1),
            reduce=self._reduce,
            stop=lambda metrics: self._stops_early(metrics.means["policy/policykl"]),
        )
        return stack_updates(history)

    def _updater(self) -> Updater:
        self.guards.max_skipped = self.config.max_skipped_updates
        return Updater(
            model=self.model,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            max_grad_norm=self.config.max_grad_norm,
            frozen=self._not_updated(),
            compute=self.compute,
            guards=self.guards,
            reduce=self._reduce,
        )

    def _not_updated(self) -> list[nn.Parameter]:
        """Trainable parameters that this step leaves as they are."""
        return []

    def _before_update(self, experience: Experience) -> None:
        """Called on every process before the update."""
        self._push_if_best(experience)

    def _after_update(self, stats: Mapping[str, Any], rows: int) -> None:
        """Called on every process after the update, with the step's statistics and its number of counted samples."""

    def _check_trainable(self) -> None:
        if type(self).step is not OnlineTrainer.step:
            raise ValueError(
                f"{type(self).__name__} has a step of its own, which train does not call: it calls the two halves of step, "
                "prepare and learn. Override these, or write the loop around generate and step"
            )

    # What a step needs to know ---------------------------------------------------------------------------------------

    def reference_kl(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor | None:
        """KL to the reference, `[B]`: log p - log p_ref in nats, summed over each response's tokens.

        Takes queries and responses as `step` does and updates nothing; None if the algorithm has no reference.
        """
        local = [[t.to(self.current_device) for t in tokens] for tokens in (queries, responses)]
        batch = self._batch(local[0], local[1])
        if not self._compares:
            return None
        evaluated = self._evaluation(batch, self._evaluator(self._recalled(batch)))(batch.rollout())
        assert evaluated.ref_logprobs is not None
        return masked_sum(evaluated.policy.logprobs - evaluated.ref_logprobs, evaluated.rollout.mask, dim=1)

    def _stops_early(self, policy_kl: float) -> bool:
        """Whether early stopping ends the passes over this batch."""
        return self.config.early_stopping and policy_kl > 1.5 * float(self.config.target_kl or 0)

    def _frozen_versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.model.parameters() if not p.requires_grad]

    def _step_safety_checker(
        self, batch_size: int | None, queries: Any, responses: Any, scores: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Checks the arguments of `step` and copies them to the model's device.

        Raises:
            ValueError: if an argument is invalid; the message names it, its value and what is expected.
        """
        return check_batch(
            self.model,
            batch_size,
            queries,
            responses,
            scores,
            is_encoder_decoder=self.is_encoder_decoder,
            device=self.current_device,
        )

    def _rows_that_count(self, rollout: Rollout) -> int:
        """Number of samples that count, over all processes, which must all call this.

        Raises:
            ValueError: if none counts.
        """
        rows = int(self._reduce(rollout.mask.any(dim=1).sum().float()))
        if rows == 0:
            raise ValueError("response_masks leave every sample out, on every process: there is nothing to learn from")
        return rows

    def _push_if_best(self, experience: Experience) -> None:
        kwargs = self.config.push_to_hub_if_best_kwargs
        if not kwargs:
            return
        if self._compared % int(self.config.compare_steps or 1) == 0:
            scores = experience.scores.double()  # the sum of finite float32 scores may overflow float32
            mean = float(pooled_mean(Tally.of(scores, experience.counted), self._reduce))
            if mean > self._highest_score:
                self._highest_score = mean
                self.push_to_hub(**kwargs)
        self._compared += 1


class _Timed:
    """Adds up the seconds spent in a function."""

    def __init__(self, function: Callable[[Rollout], Evaluated]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, rollout: Rollout) -> Evaluated:
        started = time.perf_counter()
        try:
            return self._function(rollout)
        finally:
            self.seconds += time.perf_counter() - started


@contextmanager
def _timed(timing: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timing[name] = time.perf_counter() - started
