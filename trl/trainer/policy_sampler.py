"""Samples from the policy for `PPOTrainer.generate`, and caches the engine's logprobs and values for `step`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trl.data import PadCollator
from trl.models import PreTrainedModelWrapper
from trl.models.adapters import adapter_state
from trl.models.limits import context_length, vocabulary_sizes
from trl.protocols import RolloutEngine
from trl.rollout import (
    check_context,
    check_sampling,
    choose_engine,
    known_obstacle,
    new_token_limits,
    replayed_logprobs,
    rollout_rows,
    unseen_by_scoring,
)
from trl.trainer.checks import check_lists, check_room, check_tokens
from trl.training.compute import Compute
from trl.training.modes import eval_mode
from trl.training.processes import sum_over_processes
from trl.types import Rollout, Sampling

logger = logging.getLogger(__name__)

# Maximum number of responses whose logprobs and values are cached; the oldest are dropped first.
_MAX_CACHED_RESPONSES = 2**14

State = tuple[Any, ...]


class PolicySampler:
    """Samples from a trainer's policy with the engine that a call needs.

    Args:
        accelerator: spans the processes, each of which samples with its own random numbers.
        compute: runs forward passes in the trainer's dtype.
        collator: knows the tokenizer and its pad token.
    """

    def __init__(self, accelerator: Any, compute: Compute, collator: PadCollator) -> None:
        self.accelerator = accelerator
        self.compute = compute
        self.collator = collator
        self.version = 0
        self._cache = ResponseCache()
        self._unwrapped: tuple[nn.Module, PreTrainedModelWrapper] | None = None
        self._logged: set[str] = set()
        self._warned: set[tuple[str, ...]] = set()

    def weights_changed(self) -> None:
        """Starts a new version of the policy and drops the logprobs and values of the last one."""
        self.version += 1
        self._cache.clear()

    def generate(
        self,
        model: nn.Module,
        query_tensor: Tensor | list[Tensor],
        generation_kwargs: Mapping[str, Any],
        *,
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        return_prompt: bool,
        temperature: float,
        cache: bool,
    ) -> Tensor | list[Tensor]:
        """Implements `PPOTrainer.generate`: the responses of `sample`'s rollout, in the requested form.

        Args:
            model: the policy, wrapped for its processes.
            query_tensor: one query [Q], or a list of them.
            generation_kwargs: arguments of transformers' `generate`.
            length_sampler: draws `max_new_tokens`, once per `batch_size` queries.
            batch_size: queries sampled together.
            return_prompt: prepend the query to the response (decoder-only models).
            temperature: of the update's logprobs.
            cache: keep logprobs and values for `recall`.
        """
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        kwargs = dict(generation_kwargs)
        if single and (mask := kwargs.get("attention_mask")) is not None:
            mask = torch.as_tensor(mask)
            if mask.numel() == queries[0].numel() and bool(mask.all()):  # an all-ones mask is the default
                del kwargs["attention_mask"]
        rollout = self.sample(
            model,
            queries,
            kwargs,
            length_sampler=length_sampler,
            batch_size=batch_size,
            temperature=temperature,
            cache=cache,
        )
        rows, responses = rollout_rows(rollout)
        if return_prompt and rollout.encoder_tokens is None:
            responses = [torch.cat(pair) for pair in zip(rows, responses, strict=True)]
        return responses[0].unsqueeze(0) if single else responses

    def sample(
        self,
        model: nn.Module,
        queries: list[Tensor],
        generation_kwargs: Mapping[str, Any],
        *,
        length_sampler: Callable[[], int] | None,
        batch_size: int,
        temperature: float,
        cache: bool,
    ) -> Rollout:
        """Checks the arguments, which are those of `generate`, and samples one response to each of `B` queries.

        Raises:
            ValueError: as `PPOTrainer.generate`.
        """
        check_lists(None, query_tensor=queries)
        if not queries:
            raise ValueError("query_tensor is empty; expected at least one query")
        check_tokens("query_tensor", queries, vocabulary=vocabulary_sizes(model)[0])
        check_room([len(query) for query in queries], context_length(model, encoder=True), "the query")
        policy = self._unwrap(model)
        kwargs = {"pad_token_id": self.collator.pad_token_id} | dict(generation_kwargs)
        check_sampling(policy.generation_config, kwargs)
        limits = self._limits(policy, queries, kwargs, batch_size, length_sampler)
        reshaping = unseen_by_scoring(policy.generation_config, kwargs, temperature)
        self._warn_of_reshaped_sampling(reshaping, temperature)
        with eval_mode(policy):
            engine, request = self._engine_for(
                policy,
                kwargs,
                limits,
                batch_size,
                limits_are_drawn=length_sampler is not None,
                watch=cache and not reshaping,
            )
            engine.update_weights(self.version)
            with self.compute.fresh_passes(), self.accelerator.autocast():
                rollout = engine.generate(queries, request)
        if rollout.values is not None:
            self._cache.add(self._state(policy, temperature), rollout)
        return rollout

    def replay(
        self, model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor], temperature: float
    ) -> list[Tensor] | None:
        """Log-probabilities of given responses as our own decoding loop computes them; None if it does not apply.

        Takes the unwrapped policy alone, so that one process may call it.
        """
        policy = self._unwrap(model)
        with eval_mode(policy):
            if known_obstacle(policy.pretrained_model) is not None:
                return None
            with self.compute.fresh_passes(), self.accelerator.autocast():
                return replayed_logprobs(policy.pretrained_model, queries, responses, temperature=temperature)

    def _limits(
        self,
        policy: PreTrainedModelWrapper,
        queries: Sequence[Tensor],
        kwargs: Mapping[str, Any],
        batch_size: int,
        length_sampler: Callable[[], int] | None,
    ) -> Sequence[int] | None:
        """Maximum new tokens of each response, checked to fit the context; None if only `generate` knows them."""
        lengths, seq2seq = [len(query) for query in queries], bool(policy.is_encoder_decoder)
        limits = new_token_limits(
            policy.generation_config,
            kwargs,
            lengths,
            batch_size=batch_size,
            length_sampler=length_sampler,
            is_encoder_decoder=seq2seq,
        )
        if limits is not None:
            check_context(lengths, limits, context_length(policy), is_encoder_decoder=seq2seq)
        return limits

    def recall(
        self, model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor], temperature: float
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Logprobs and values of the sampled tokens, as the engine computed them in `generate`.

        None, on every process, unless every process has them for its whole batch, from the current policy. Every
        process must call this.
        """
        cached = self._cache.find(self._state(self._unwrap(model), temperature), queries, responses)
        missing = torch.tensor(float(cached is None), device=self.accelerator.device)
        if float(sum_over_processes(self.accelerator, missing)) > 0:
            self._log_once(
                "score_while_sampling: running the scoring pass, since generate did not sample every response of the "
                "batch from the current policy's unmodified distribution"
            )
            return None
        return cached

    def _unwrap(self, model: nn.Module) -> PreTrainedModelWrapper:
        """`accelerator.unwrap_model`, which walks all modules, once per model."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            self._unwrapped = (model, self.accelerator.unwrap_model(model))
        return self._unwrapped[1]

    def _engine_for(
        self,
        policy: PreTrainedModelWrapper,
        kwargs: dict[str, Any],
        limits: Sequence[int] | None,
        batch_size: int,
        *,
        limits_are_drawn: bool,
        watch: bool,
    ) -> tuple[RolloutEngine, Sampling]:
        """Returns the engine (for transformers' `generate`, the reason is logged once) and the request to it.

        Args:
            policy: the unwrapped policy, in evaluation mode.
            kwargs: arguments of transformers' `generate`.
            limits: maximum new tokens of each response; None leaves them to `generate`.
            batch_size: queries sampled together.
            limits_are_drawn: whether a length sampler drew the limits, which then override `kwargs`.
            watch: record the critic's values in our own loop, unless it samples greedily.
        """
        choice = choose_engine(
            policy,
            kwargs,
            limits,
            tokenizer=self.collator.tokenizer,
            pad_token=self.collator.pad_token_id,
            batch_size=batch_size,
            limits_are_drawn=limits_are_drawn,
            critic=policy.watch_values if watch else nullcontext,
        )
        if choice.reason is None:
            return choice.engine, replace(choice.request, seed=self._seed())
        self._log_once(f"sampling with transformers' generate: {choice.reason}")
        # Rank 0 draws from torch's global generator itself, which has the same seed on every process.
        seed = self._seed() if self.accelerator.process_index else None
        return choice.engine, replace(choice.request, seed=seed)

    def _seed(self) -> int:
        """Draws a seed from torch's global generator and adds the rank, since processes may share its state."""
        return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")) + self.accelerator.process_index

    def _state(self, policy: PreTrainedModelWrapper, temperature: float) -> State:
        """Identifies everything that logprobs and values depend on besides the tokens, by torch's version counters."""
        tensors = (*policy.parameters(), *policy.buffers())
        counts = [
            (id(t), None if t.is_inference() else t._version) for t in tensors
        ]  # inference tensors have no counter
        adapters = adapter_state(policy) if policy.is_peft_model else ()
        return float(temperature), self.version, tuple(counts), adapters

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)

    def _warn_of_reshaped_sampling(self, reshaping: Mapping[str, Any], temperature: float) -> None:
        names = tuple(reshaping)
        if names and names not in self._warned:
            self._warned.add(names)
            settings = ", ".join(f"{name}={value!r}" for name, value in reshaping.items())
            warnings.warn(
                f"responses are sampled with {settings}, but the update's log-probabilities (softmax at "
                f"PPOConfig.temperature={temperature}) ignore these settings: expect a biased ratio and a negative KL",
                stacklevel=7,
            )


class ResponseCache:
    """Logprobs and values computed while sampling, by the tokens of query and response, for one state of the policy."""

    def __init__(self) -> None:
        self._state: State = ()
        self._rows: dict[tuple[bytes, bytes], tuple[Tensor, Tensor]] = {}

    def add(self, state: State, rollout: Rollout) -> None:
        """Adds the rows of a rollout with logprobs and values; drops those of any other state."""
        assert rollout.sampler_logprobs is not None and rollout.values is not None
        if state != self._state:
            self.clear()
            self._state = state
        sizes = rollout.mask.sum(dim=1).tolist()
        columns = [tensor[rollout.mask].split(sizes) for tensor in (rollout.sampler_logprobs, rollout.values)]
        for query, response, logprobs, values in zip(*rollout_rows(rollout), *columns, strict=True):
            self._rows[_key(query, response)] = (logprobs, values)
        for key in list(self._rows)[: max(0, len(self._rows) - _MAX_CACHED_RESPONSES)]:
            del self._rows[key]

    def find(
        self, state: State, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Logprobs and values of these responses; None if one is missing or they belong to another state."""
        rows = [self._rows.get(_key(q, r)) for q, r in zip(queries, responses, strict=True)]
        known = [row for row in rows if row is not None]
        if state != self._state or len(known) < len(rows):
            return None
        return [logprobs for logprobs, _ in known], [values for _, values in known]

    def clear(self) -> None:
        """Drops everything."""
        self._rows.clear()


def _key(query: Tensor, response: Tensor) -> tuple[bytes, bytes]:
    first, second = (tokens.detach().cpu().long().numpy().tobytes() for tokens in (query, response))
    return first, second
