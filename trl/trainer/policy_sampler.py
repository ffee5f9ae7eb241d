"""Samples from the policy for `PPOTrainer.generate`, and keeps what the engine saw for `step`."""

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
    LocalEngine,
    TransformersEngine,
    check_context,
    check_sampling,
    local_sampling,
    new_token_limits,
    obstacle,
    rollout_rows,
    unseen_by_scoring,
)
from trl.trainer.checks import check_lists, check_room, check_tokens
from trl.training.compute import Compute
from trl.training.modes import eval_mode
from trl.training.processes import sum_over_processes
from trl.types import Rollout, Sampling

logger = logging.getLogger(__name__)

# Maximum number of responses whose logprobs and values are kept; the oldest are dropped first.
_MOST_RESPONSES = 2**14

State = tuple[Any, ...]


class PolicySampler:
    """Samples from a trainer's policy with the engine that a call needs.

    Args:
        accelerator: spans the processes, each of which samples with random numbers of its own.
        compute: runs forward passes in the trainer's dtype.
        collator: knows the tokenizer and its pad token.
    """

    def __init__(self, accelerator: Any, compute: Compute, collator: PadCollator) -> None:
        self.accelerator = accelerator
        self.compute = compute
        self.collator = collator
        self.version = 0
        self._seen = SeenNumbers()
        self._unwrapped: tuple[nn.Module, PreTrainedModelWrapper] | None = None
        self._trial: tuple[nn.Module, str | None] | None = None  # a model, and what `obstacle` says of it
        self._logged: set[str] = set()
        self._warned: set[tuple[str, ...]] = set()

    def weights_changed(self) -> None:
        """Starts a new version of the policy and drops what was seen of the last one."""
        self.version += 1
        self._seen.clear()

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
        remember: bool,
    ) -> Tensor | list[Tensor]:
        """Implements `PPOTrainer.generate`.

        Args:
            model: the policy, wrapped for its processes.
            query_tensor: one query [Q], or a list of them.
            generation_kwargs: arguments of transformers' `generate`.
            length_sampler: draws `max_new_tokens`, once per `batch_size` queries.
            batch_size: queries sampled together.
            return_prompt: prepend the query to the response (decoder-only models).
            temperature: of the update's logprobs.
            remember: keep logprobs and values for `recall`.
        """
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        check_lists(None, query_tensor=queries)
        check_tokens("query_tensor", queries, vocabulary=vocabulary_sizes(model)[0])
        lengths = [len(query) for query in queries]
        check_room(lengths, context_length(model, encoder=True), "the query")
        policy = self._unwrap(model)
        kwargs = {"pad_token_id": self.collator.pad_token_id} | dict(generation_kwargs)
        if isinstance(query_tensor, Tensor) and (mask := kwargs.get("attention_mask")) is not None:
            mask = torch.as_tensor(mask)
            if mask.numel() == lengths[0] and bool(mask.all()):  # says nothing that the query does not
                del kwargs["attention_mask"]
        check_sampling(policy.generation_config, kwargs)
        seq2seq = bool(policy.is_encoder_decoder)
        limits = new_token_limits(
            policy.generation_config,
            kwargs,
            lengths,
            batch_size=batch_size,
            length_sampler=length_sampler,
            is_encoder_decoder=seq2seq,
        )
        if limits is not None:
            check_context(lengths, limits, context_length(model), is_encoder_decoder=seq2seq)
        unseen = unseen_by_scoring(policy.generation_config, kwargs, temperature)
        self._warn_of_reshaped_sampling(unseen, temperature)
        engine, request = self._engine_for(
            policy,
            kwargs,
            limits,
            batch_size,
            limits_are_drawn=length_sampler is not None,
            watch=remember and not unseen,
        )
        engine.update_weights(self.version)
        with eval_mode(policy), self.compute.fresh_passes():
            rollout = engine.generate(queries, request)
        rows, responses = rollout_rows(rollout)
        if rollout.values is not None:
            self._seen.keep(self._state(policy, temperature), rows, responses, rollout)
        if return_prompt and not seq2seq:
            responses = [torch.cat(pair) for pair in zip(rows, responses, strict=True)]
        return responses[0].unsqueeze(0) if isinstance(query_tensor, Tensor) else responses

    def recall(
        self, model: nn.Module, queries: Sequence[Tensor], responses: Sequence[Tensor], temperature: float
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Returns logprobs and values, one per sampled token, that the engine saw in `generate`.

        None, on every process, unless every process has them for its whole batch, from the policy as it is now. Every
        process must call this.
        """
        seen = self._seen.find(self._state(self._unwrap(model), temperature), queries, responses)
        missing = torch.tensor(float(seen is None), device=self.accelerator.device)
        if float(sum_over_processes(self.accelerator, missing)) > 0:
            self._log_once(
                "score_while_sampling: a scoring pass is made all the same, for a batch with responses that generate did "
                "not sample from the policy's plain distribution since its weights changed last"
            )
            return None
        return seen

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
        """Returns our own loop and the request to it; or transformers' `generate`, with the reason logged once.

        Args:
            policy: the unwrapped policy.
            kwargs: arguments of transformers' `generate`.
            limits: maximum new tokens of each response; None leaves them to `generate`.
            batch_size: queries sampled together.
            limits_are_drawn: whether a length sampler drew the limits, which then override `kwargs`.
            watch: have our own loop watch the critic, unless it samples greedily.
        """
        model, pad_token = policy.pretrained_model, self.collator.pad_token_id
        if self._trial is None or self._trial[0] is not model:
            with eval_mode(policy):
                self._trial = (model, obstacle(model))
        problem = self._trial[1]
        drawn: dict[str, Any] = {"max_new_tokens": 1} if limits_are_drawn else {}  # any number: the limits say which
        request = local_sampling(policy.generation_config, kwargs | drawn)
        reason = problem or (request if isinstance(request, str) else None)
        if isinstance(request, Sampling) and limits is not None and reason is None:
            critic = policy.watch_values if watch and not request.greedy else nullcontext
            engine = LocalEngine(model, pad_token=pad_token, batch_size=batch_size, critic=critic)
            return engine, replace(request, limits=tuple(limits), seed=self._seed())
        self._log_once(f"sampling with transformers' generate: {reason}")
        # Rank 0 draws from torch's global generator itself, which has the same seed on every process.
        seed = self._seed() if self.accelerator.process_index else None
        return (
            TransformersEngine(
                policy,
                tokenizer=self.collator.tokenizer,
                pad_token=pad_token,
                batch_size=batch_size,
                pads=problem is None,
                arguments=kwargs,
            ),
            Sampling(limits=tuple(limits or ()) if limits_are_drawn else (), seed=seed),
        )

    def _seed(self) -> int:
        """Draws a seed from torch's global generator, and tells the processes apart by their rank."""
        return int(torch.randint(2**62, (), dtype=torch.int64)) + self.accelerator.process_index

    def _state(self, policy: PreTrainedModelWrapper, temperature: float) -> State:
        """Identifies what logprobs and values depend on besides the tokens, as far as torch counts its changes."""
        tensors = (*policy.parameters(), *policy.buffers())
        counts = [(id(t), None if t.is_inference() else t._version) for t in tensors]  # inference tensors count nothing
        adapters = adapter_state(policy) if policy.is_peft_model else ()
        return float(temperature), self.version, tuple(counts), adapters

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            logger.info(message)

    def _warn_of_reshaped_sampling(self, unseen: Mapping[str, Any], temperature: float) -> None:
        names = tuple(unseen)
        if unseen and names not in self._warned:
            self._warned.add(names)
            settings = ", ".join(f"{name}={value!r}" for name, value in unseen.items())
            warnings.warn(
                f"responses are sampled with {settings}, which the log-probabilities of the update (softmax at "
                f"PPOConfig.temperature={temperature}) do not know of: expect a biased ratio and a negative KL",
                stacklevel=4,
            )


class SeenNumbers:
    """Logprobs and values that an engine saw, by the tokens of query and response, for one state of the policy."""

    def __init__(self) -> None:
        self._state: State = ()
        self._rows: dict[tuple[bytes, bytes], tuple[Tensor, Tensor]] = {}

    def keep(self, state: State, queries: Sequence[Tensor], responses: Sequence[Tensor], rollout: Rollout) -> None:
        """Adds the rows of a rollout that has logprobs and values; drops those of any other state."""
        assert rollout.sampler_logprobs is not None and rollout.values is not None
        if state != self._state:
            self.clear()
            self._state = state
        sizes = rollout.mask.sum(dim=1).tolist()
        numbers = [table[rollout.mask].split(sizes) for table in (rollout.sampler_logprobs, rollout.values)]
        for query, response, logprobs, values in zip(queries, responses, *numbers, strict=True):
            self._rows[_key(query, response)] = (logprobs, values)
        for key in list(self._rows)[: max(0, len(self._rows) - _MOST_RESPONSES)]:
            del self._rows[key]

    def find(
        self, state: State, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """Returns logprobs and values of these responses; None if one is missing or the policy's state is another."""
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
