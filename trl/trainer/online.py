"""`OnlineTrainer`: sample, score, learn, for any algorithm; `step` is one pass of it on given responses."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedTokenizerBase

from trl.core import PPODecorators, set_seed
from trl.data import PadCollator, prompt_loader
from trl.functional import Moments, masked_sum
from trl.kernels.allocator import keep_freed_memory
from trl.models import RolloutAboveFrozen
from trl.models.adapters import check_adapters_on
from trl.models.recompute import recompute_activations
from trl.protocols import Algorithm
from trl.redaction import remember_secrets
from trl.rollout import stop_tokens
from trl.state.fingerprints import Fingerprints
from trl.trainer.construction import check_parts, check_unused_settings, critic_free, make_optimizer, make_reference
from trl.trainer.given import check_batch, check_extras, scored_by_caller
from trl.trainer.kl_controllers import controller_for
from trl.trainer.live_settings import LiveSettings
from trl.trainer.policy_sampler import PolicySampler
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.resumable import ResumableTrainer
from trl.trainer.tracking import check_trackers, settings_to_track
from trl.training.batch import Batch
from trl.training.compute import Compute
from trl.training.evaluator import Evaluated, Evaluator
from trl.training.guards import UpdateGuards
from trl.training.loop import Updater, optimize
from trl.training.optimizers import group_settings, inner, unheld
from trl.training.peak import memory_statistics
from trl.training.processes import check_same, make_accelerator, whole_gradients
from trl.training.resume import settings_of
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


class OnlineTrainer(ResumableTrainer):
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

    recipe: Recipe | None = None
    """The algorithm's choices; None where a subclass makes its own algorithm."""

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
        if algorithm is not None:
            check_unused_settings(config, algorithm.name)
            model, ref_model = critic_free(model), critic_free(ref_model)
            self.recipe, self.name = algorithm, algorithm.name
        elif type(self) is OnlineTrainer:
            raise ValueError("algorithm must be given, such as trl.algorithms.grpo(); PPO has PPOTrainer")
        check_parts(config, model, tokenizer, optimizer, lr_scheduler)
        assert config is not None and tokenizer is not None
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
        self.current_device = self.accelerator.device
        reference = make_reference(model, ref_model, num_shared_layers) if self._compares else None
        self.dataset = dataset
        self.data_collator = PadCollator(tokenizer)
        if dataset is None:
            warnings.warn(
                "no dataset is given: trainer.dataloader is None, and step takes what you give it", stacklevel=3
            )
        self._forward_columns = list(inspect.signature(model.forward).parameters)
        self._prepare_models(model, reference, optimizer, lr_scheduler, dataset, data_collator)
        self.kl_ctl = controller_for(config)
        self._live_settings = LiveSettings(config, rate_is_ours=optimizer is None and lr_scheduler is None)
        self.current_step = 0
        self.score_moments = Moments()
        self._generator = torch.Generator().manual_seed(int(config.seed or 0))
        self._highest_score = float("-inf")
        self._compared = 0
        self._steps_done = 0
        self.guards = UpdateGuards()
        self.last_experience: Experience | None = None
        """Experience of the last `step`: per-token rewards, values and advantages from before its update."""
        self.fingerprints = Fingerprints()
        self._sampler = PolicySampler(self.accelerator, self.compute, self.data_collator)

    @property
    def _compares(self) -> bool:
        """Whether the algorithm compares the policy with a reference."""
        return self.recipe is None or self.recipe.uses_reference

    def _prepare_models(
        self, model: Any, reference: Any, optimizer: Any, lr_scheduler: Any, dataset: Any, data_collator: Any
    ) -> None:
        """Wraps models, optimizer and data for their processes, and sets the compute dtype."""
        config = self.config
        loader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        optimizer = make_optimizer(config, [p for p in model.parameters() if p.requires_grad], optimizer)
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

    # Data ------------------------------------------------------------------------------------------------------------

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

    def _batch(self, queries: list[Tensor], responses: list[Tensor]) -> Batch:
        return Batch(
            queries=queries,
            responses=responses,
            inputs=self.prepare_model_inputs(queries, responses),
            is_encoder_decoder=self.is_encoder_decoder,
        )

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
            batch.place(part if start is None else [torch.cat(pair) for pair in zip(start, part, strict=True)])
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
        *,
        group: Sequence[int] | None = None,
    ) -> Prepared:
        """First half of `step`: evaluates policy and reference and computes advantages, without updating anything.

        Takes the arguments of `step` and raises the same errors. To skip a batch, do not pass the result to `learn`.

        Args:
            queries: as for `step`, like the arguments below.
            responses: see `step`.
            scores: see `step`.
            response_masks: see `step`.
            token_rewards: see `step`.
            sampler_logprobs: see `step`.
            group: one number per response, equal for responses to one prompt; by default, equal for equal queries.
        """
        self._begin_call()
        started = time.perf_counter()
        timing: dict[str, float] = {}
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
            stats[f"{self.name}/learning_rate"] = (
                math.nan if rate is None else float(rate)
            )  # Adafactor may make its own
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

    def _saved_model(self) -> Any:
        model = super()._saved_model()
        return model if self.recipe is None else model.pretrained_model  # its value head takes no part

    def _begin_call(self) -> None:
        """Takes up changed settings, and checks that the model can be trained as it is now."""
        self.config.validate()
        self.kl_ctl = self._live_settings.follow(self.config, self.optimizer, self.kl_ctl)
        self._warn_of_unheld()
        if self.is_peft_model:
            check_adapters_on(self.model)

    def _stops_early(self, policy_kl: float) -> bool:
        """Whether early stopping ends the passes over this batch."""
        return self.config.early_stopping and policy_kl > 1.5 * float(self.config.target_kl or 0)

    def _frozen_versions(self) -> list[tuple[int, int]]:
        return [(id(p), p._version) for p in self.model.parameters() if not p.requires_grad]

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
