"""`PolicyTrainer`: builds a trainer's models, optimizer and data, and samples from its policy."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedTokenizerBase

from trl.core import set_seed
from trl.data import PadCollator, is_hub_dataset, prompt_loader
from trl.functional import Moments
from trl.models import reference_mode
from trl.models.adapters import check_adapters_on
from trl.models.recompute import recompute_activations
from trl.redaction import remember_secrets
from trl.rollout import stop_tokens
from trl.state.fingerprints import Fingerprints
from trl.trainer.construction import (
    check_parts,
    check_unused_settings,
    critic_free,
    make_optimizer,
    make_reference,
    start_accelerator,
)
from trl.trainer.hooks import call_generate_batched, is_overridden, model_or_queries_first
from trl.trainer.kl_controllers import controller_for
from trl.trainer.live_settings import LiveSettings
from trl.trainer.policy_sampler import PolicySampler
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.resumable import ResumableTrainer
from trl.trainer.setting_names import names_unknown_arguments
from trl.trainer.tracking import check_trackers
from trl.training.batch import Batch
from trl.training.compute import Compute
from trl.training.guards import UpdateGuards
from trl.training.optimizers import group_settings, inner, missing_parameters
from trl.training.setup import Recipe
from trl.types import Evaluation, Experience

_TRAINER_COLUMNS = ("label", "query", "response")


class PolicyTrainer(ResumableTrainer):
    """A trainer's models, optimizer, data and sampling. `OnlineTrainer` documents the arguments."""

    _trl_samples_reference = False  # True while sampling the reference: do not cache its logprobs
    _trl_dataloader: Any = None
    _trl_recipe: Recipe | None = None
    """The algorithm's choices; None if a subclass builds its own algorithm."""

    @names_unknown_arguments
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
        self._trl_check_algorithm(algorithm)
        if algorithm is not None:
            check_unused_settings(config, algorithm.name)
            model, ref_model = critic_free(model), None if ref_model is None else critic_free(ref_model)
            self._trl_recipe, self._trl_stats_prefix = algorithm, algorithm.name
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
        self.accelerator = start_accelerator(config)
        self.is_distributed = self.accelerator.num_processes > 1
        self.current_device = self.accelerator.device
        config.world_size = self.accelerator.num_processes
        config.global_batch_size = int(config.batch_size or 1) * config.world_size
        config.global_backward_batch_size = config.samples_per_update * config.world_size
        config.is_encoder_decoder, config.is_peft_model = self.is_encoder_decoder, self.is_peft_model
        if not self._trl_uses_reference and not (ref_model is None and num_shared_layers is None):
            raise ValueError(f"{self._trl_stats_prefix} has no KL penalty: leave ref_model and num_shared_layers out")
        reference = make_reference(model, ref_model, num_shared_layers) if self._trl_uses_reference else None
        self.dataset = dataset
        self.data_collator: Callable[..., Any] = PadCollator(tokenizer)
        self._trl_forward_columns = list(inspect.signature(model.forward).parameters)
        self._trl_prepare_models(model, reference, optimizer, lr_scheduler, dataset, data_collator)
        self.kl_ctl = controller_for(config)
        self._trl_live_settings = LiveSettings(config, controls_rate=optimizer is None and lr_scheduler is None)
        self.current_step = 0
        self._trl_score_moments = Moments()
        self._trl_generator = torch.Generator().manual_seed(int(config.seed or 0))
        self._trl_highest_score = float("-inf")
        self._trl_compared = 0
        self._trl_steps_done = 0
        self._trl_guards = UpdateGuards()
        self.last_experience: Experience | None = None
        """Experience of the last `step`: per-token rewards, values and advantages from before its update."""
        self._trl_fingerprints = Fingerprints()
        self._trl_sampler = PolicySampler(self.accelerator, self._trl_compute, self.data_collator)

    def _trl_check_algorithm(self, algorithm: Recipe | None) -> None:
        """Raises ValueError if the trainer needs an algorithm and none is given."""

    @property
    def _trl_uses_reference(self) -> bool:
        """Whether the algorithm compares the policy with a reference."""
        return self._trl_recipe is None or self._trl_recipe.uses_reference

    @property
    def _trl_choices(self) -> dict[str, str]:
        """Name and choices of the algorithm, in words; PPO's are settings of `config`."""
        return {"name": self._trl_stats_prefix} | ({} if self._trl_recipe is None else self._trl_recipe.settings)

    def _trl_prepare_models(
        self, model: Any, reference: Any, optimizer: Any, lr_scheduler: Any, dataset: Any, data_collator: Any
    ) -> None:
        """Wraps models, optimizer and data for their processes, and sets the compute dtype."""
        config = self.config
        loader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        optimizer = make_optimizer(config, [p for p in model.parameters() if p.requires_grad], optimizer)
        self.model, self.optimizer, self._trl_dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, loader, lr_scheduler
        )
        self._trl_optimizer_made_with = group_settings(inner(self.optimizer))
        self._trl_missing = missing_parameters(self.optimizer, self.model)  # known to the caller, so no warning
        self._trl_compute = Compute(self.model, config.dtype, self.accelerator)
        if reference is not None:
            self._trl_compute.adopt_reference(reference, model)
        self.ref_model = None if reference is None else self.accelerator.prepare_model(reference, evaluation_mode=True)
        if config.gradient_checkpointing:
            recompute_activations(self.model)

    # Data ------------------------------------------------------------------------------------------------------------

    @property
    def dataloader(self) -> Any:
        """Shuffled batches of the trainer's `dataset`; None, with a warning, if it has none."""
        if self._trl_dataloader is None:
            warnings.warn(
                "no dataset is given: trainer.dataloader is None, so pass your own batches to step", stacklevel=2
            )
        return self._trl_dataloader

    @dataloader.setter
    def dataloader(self, loader: Any) -> None:
        self._trl_dataloader = loader

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> DataLoader[Any]:
        """DataLoader with shuffled batches of `config.batch_size`, dropping an incomplete last batch.

        Args:
            dataset: a torch dataset, or a `datasets.Dataset`, whose unused columns are removed if
                `config.remove_unused_columns`.
            data_collator: turns a list of examples into a batch.

        Raises:
            ValueError: if `dataset` is neither of the two, or is smaller than one batch.
        """
        if self.config.remove_unused_columns and is_hub_dataset(dataset):
            dataset = self._remove_unused_columns(dataset)
        batch_size = int(self.config.batch_size or 1)
        return prompt_loader(dataset, batch_size=batch_size, collate_fn=data_collator, keep=None)

    def _remove_unused_columns(self, dataset: Any) -> Any:
        """The `datasets.Dataset` without columns that neither the model's `forward` nor the trainer uses; a hook."""
        used = (*self._trl_forward_columns, *_TRAINER_COLUMNS)
        return dataset.remove_columns([column for column in dataset.column_names if column not in used])

    def prepare_model_inputs(self, queries: list[Tensor], responses: list[Tensor]) -> BatchEncoding:
        """Pads queries and responses into model inputs, on the tokenizer's padding side.

        Args:
            queries: `B` 1-D tensors.
            responses: `B` 1-D tensors.

        Returns:
            `input_ids` and `attention_mask` [B, T] of query + response. For an encoder-decoder, those of the queries,
            plus `decoder_input_ids` and `decoder_attention_mask` of the responses.
        """
        if self.is_encoder_decoder:
            inputs = self._trl_pad(queries)
            inputs |= {f"decoder_{name}": tensor for name, tensor in self._trl_pad(responses).items()}
        else:
            inputs = self._trl_pad([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
        return BatchEncoding({name: tensor.to(self.current_device) for name, tensor in inputs.items()})

    def _trl_pad(self, sequences: list[Tensor]) -> dict[str, Tensor]:
        padded = self.data_collator([{"input_ids": s, "attention_mask": torch.ones_like(s)} for s in sequences])
        return {name: tensor for name, tensor in padded.items() if name != "labels"}  # of language-model collators

    def _trl_batch(self, queries: list[Tensor], responses: list[Tensor]) -> Batch:
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
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Samples responses with trl's own decoding loop, falling back to transformers' `generate` where needed.

        Each token uses one random number from a generator seeded by torch's global one, so `set_seed` reproduces the
        responses whatever the batch size.

        Args:
            query_tensor: one query [Q], or a list of them.
            length_sampler: draws `max_new_tokens`, once per `batch_size` queries.
            batch_size: queries sampled together; our own loop may take more where memory allows.
            return_prompt: prepend the query to the response (decoder-only models).
            generate_ref_response: also sample from the reference, with random numbers of its own.
            **generation_kwargs: arguments of transformers' `generate`. Those that change the sampling distribution
                trigger a warning.

        Returns:
            `[1, R]` for a single query, else a list of 1-D responses. A sampled stop token is kept; an
            encoder-decoder's response begins with the decoder's start token. With `generate_ref_response`, a pair: the
            policy's and the reference's.

        Raises:
            ValueError: if a query is not a 1-D tensor of valid token ids, if query and response might not fit into the
                model's context, or if the arguments do not ask for exactly one response per query.
        """
        arguments: dict[str, Any] = {
            "length_sampler": length_sampler,
            "batch_size": batch_size,
            "return_prompt": return_prompt,
        }
        arguments |= generation_kwargs
        responses = self._trl_sample_by_hook(self.model, query_tensor, arguments)
        if not generate_ref_response:
            return responses
        return responses, self._trl_generate_from_reference(query_tensor, **arguments)

    def _trl_sample_by_hook(self, model: nn.Module, query_tensor: Any, arguments: dict[str, Any]) -> Any:
        """Samples with `_generate_batched`, where a subclass overrides it and there are several queries."""
        if not isinstance(query_tensor, Tensor) and is_overridden(self, PolicyTrainer, "_generate_batched"):
            return call_generate_batched(self, model, query_tensor, **arguments)
        return self._trl_sample(model, query_tensor, **arguments)

    def _trl_generate_from_reference(
        self, query_tensor: Any, length_sampler: Callable[[], int] | None = None, **generation_kwargs: Any
    ) -> Any:
        """Samples from the reference as `generate` does from the policy, with the next random numbers.

        Raises:
            ValueError: if the algorithm uses no reference.
        """
        if not self._trl_uses_reference:
            raise ValueError("generate_ref_response=True needs a reference model, which this algorithm does not use")
        arguments = {"length_sampler": length_sampler, **generation_kwargs}
        self._trl_samples_reference = True
        try:
            with reference_mode(self.model) if self.ref_model is None else nullcontext(self.ref_model) as reference:
                return self._trl_sample_by_hook(reference, query_tensor, arguments)
        finally:
            self._trl_samples_reference = False

    def _trl_sample(
        self,
        model: nn.Module,
        query_tensor: Any,
        *,
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        remove_padding: bool = True,
        pad_to_multiple_of: int | None = None,  # of the padded batches, which are not returned
        **generation_kwargs: Any,
    ) -> Any:
        if not remove_padding:
            raise ValueError("remove_padding=False: responses are returned without padding; pad them with pad_sequence")
        return self._trl_sampler.generate(
            model,
            query_tensor,
            generation_kwargs,
            length_sampler=length_sampler,
            batch_size=batch_size,
            return_prompt=return_prompt,
            temperature=self.config.temperature,
            cache=self.config.score_while_sampling and not self._trl_samples_reference,
        )

    @model_or_queries_first
    def _generate_batched(
        self,
        model: Any,
        query_tensors: Any,
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        pad_to_multiple_of: int | None = None,
        remove_padding: bool = True,
        **generation_kwargs: Any,
    ) -> list[Tensor]:
        """Samples responses to a list of queries; a hook of TRL 0.5 to 0.11, which `generate` calls for lists.

        Arguments as for `generate`. `model` came with TRL 0.7: before, the queries were the first argument.
        """
        return self._trl_sample(
            model,
            query_tensors,
            length_sampler=length_sampler,
            batch_size=batch_size,
            return_prompt=return_prompt,
            remove_padding=remove_padding,
            **generation_kwargs,
        )

    def _trl_replay(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> list[Tensor] | None:
        """Log-probabilities of responses as the sampler computes them; see `Learner`."""
        start = int(self.is_encoder_decoder)
        sampled = [response[start:] for response in responses]
        return self._trl_sampler.replay(self.model, queries, sampled, self.config.temperature)

    def _trl_recalled(self, batch: Batch) -> Evaluation | None:
        """Evaluation cached by `generate`, to skip the scoring pass; None unless every process has its whole batch."""
        if not self.config.score_while_sampling:
            return None
        cached = self._trl_sampler.recall(self.model, batch.queries, batch.responses, self.config.temperature)
        if cached is None:
            return None
        # The decoder's start token was not sampled, so it has no log-probability or value.
        start = int(self.is_encoder_decoder)
        logprobs, values = (batch.place([nn.functional.pad(row, (start, 0)) for row in rows]) for rows in cached)
        return Evaluation(logprobs=logprobs, values=values, entropy=None)

    # Checks before each call ---------------------------------------------------------------------------------------

    def _trl_begin_call(self) -> None:
        """Applies changed settings and checks that the model can be trained in its current state."""
        self.config.validate()
        if self.ref_model is self.model:  # assigned later: the constructor rejects it
            raise ValueError(
                "trainer.ref_model is trainer.model, so that the KL is always 0: set it to "
                "create_reference_model(model). See docs/doctor.md#reference-is-policy"
            )
        self.kl_ctl = self._trl_live_settings.follow(self.config, self.optimizer, self.kl_ctl)
        self._trl_warn_of_missing_parameters()
        if self.is_peft_model:
            check_adapters_on(self.model)

    def _trl_warn_of_missing_parameters(self) -> None:
        """Warns about parameters that became trainable after the optimizer was built."""
        missing = missing_parameters(self.optimizer, self.model)
        if new := [name for name, p in missing.items() if self._trl_missing.get(name) is not p]:
            warnings.warn(
                f"{len(new)} parameters, such as {new[0]}, became trainable after the trainer was built, but its "
                "optimizer does not hold them and will not update them: build a new trainer, or call "
                "trainer.optimizer.add_param_group",
                stacklevel=4,
            )
        self._trl_missing = missing

    def _trl_stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a response: `config.stop_token_ids`, or those of the model and tokenizer."""
        if self.config.stop_token_ids is not None:
            return tuple(self.config.stop_token_ids)
        model = self.accelerator.unwrap_model(self.model)
        stops = set(stop_tokens(model.generation_config, {}))
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        return tuple(sorted(stops))

    def _trl_saved_model(self) -> Any:
        model = super()._trl_saved_model()
        return model if self._trl_recipe is None else model.pretrained_model  # without its unused value head
