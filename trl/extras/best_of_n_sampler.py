"""`BestOfNSampler`: samples several responses per query and returns the best by a reward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl import legacy
from trl.core import set_seed
from trl.models import PreTrainedModelWrapper
from trl.models.limits import context_length, vocabulary_sizes
from trl.protocols import Reward
from trl.rewards import as_reward
from trl.rewards.compose import score_apart
from trl.rollout import check_context, check_sampling, choose_engine, new_token_limits, rollout_rows
from trl.rollout.generation_settings import effective
from trl.runs.samples import totals
from trl.training.modes import eval_mode
from trl.types import Sample

Queries: TypeAlias = "Sequence[int] | Tensor | Sequence[Tensor] | Sequence[Sequence[int]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The responses to one query, best first. Responses without a score are left out."""

    texts: list[str]  # query and response; an encoder-decoder's response alone
    completions: list[str]  # the response alone
    responses: list[Tensor]  # 1-D tokens
    scores: list[float]


class BestOfNSampler:
    """Samples `sample_size` responses per query and returns the `n_candidates` with the highest scores.

    Args:
        model: a value-head model, or a plain transformers or PEFT language model.
        tokenizer: the model's tokenizer.
        queries_to_scores: a function of a list of texts (query and response, in one call per query) that returns their
            scores; or any reward that `trl.rewards.as_reward` accepts, which gets prompts and completions. A function
            with a single argument, other than `samples` or `completions`, is a function of texts.
        length_sampler: draws `max_new_tokens`, once per query; None leaves the length to `generation_config` or to the
            arguments of `generate`.
        sample_size: responses per query.
        seed: seeds all global random generators once, here (`trl.set_seed`); None leaves them as they are.
        n_candidates: responses to return per query, at most `sample_size`.
        generation_config: default arguments of `generate`, a `transformers.GenerationConfig`.

    Raises:
        ValueError: if model or tokenizer is of the wrong type, or a number is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float]] | Any,
        length_sampler: Callable[[], int] | None,
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: Any = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(f"tokenizer must be a transformers tokenizer, not {type(tokenizer).__name__}")
        plain = PreTrainedModelWrapper.supported_pretrained_model_architectures
        if not isinstance(model, (PreTrainedModelWrapper, *plain)):
            raise ValueError(
                f"model must be a value-head model or a transformers language model, not {type(model).__name__}; load "
                "it with AutoModelForCausalLMWithValueHead.from_pretrained"
            )
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(f"n_candidates={n_candidates} must be from 1 to sample_size={sample_size}")
        if seed is not None:
            set_seed(seed)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self.gen_config = generation_config

    def generate(
        self,
        tokenized_query: Queries,
        skip_special_tokens: bool = True,
        device: str | torch.device | None = None,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """Returns the best texts of each query.

        Args:
            tokenized_query: one query (a list of ints or a 1-D tensor) or several (a list of these).
            skip_special_tokens: leave special tokens out of the texts, those that are scored included.
            device: the model's device, which queries are moved to in any case.
            **generation_kwargs: arguments of transformers' `generate`, which override `generation_config`.

        Returns:
            For each query `n_candidates` texts, best first: query and response, or an encoder-decoder's response.

        Raises:
            ValueError: as `candidates`, or if fewer than `n_candidates` responses to a query have a score.
        """
        if device is not None and not _same_device(torch.device(device), self.model.device):
            raise ValueError(f"device={device} is not the model's, {self.model.device}: move the model with model.to")
        best = self.candidates(tokenized_query, skip_special_tokens, **generation_kwargs)
        for i, candidates in enumerate(best):
            if len(candidates.texts) < self.n_candidates:
                raise ValueError(
                    f"query {i}: the reward scored only {len(candidates.texts)} of {self.sample_size} responses, fewer "
                    f"than n_candidates={self.n_candidates}; raise sample_size or mend the reward"
                )
        return [candidates.texts[: self.n_candidates] for candidates in best]

    def candidates(
        self, tokenized_query: Queries, skip_special_tokens: bool = True, **generation_kwargs: Any
    ) -> list[Candidates]:
        """Samples and scores `sample_size` responses per query, for the curves of `trl.functional.best_of_n`.

        Args:
            tokenized_query: as for `generate`.
            skip_special_tokens: leave special tokens out of texts and completions.
            **generation_kwargs: arguments of transformers' `generate`.

        Raises:
            ValueError: if a query is empty, is not 1-D or has tokens outside the vocabulary, if a response might not
                fit into the model's context, or if an argument of `generate` is not supported.
            RewardFailed: if the reward fails, or returns something other than one number or None per text.
        """
        queries = self._queries(tokenized_query)
        responses = self._sample([query for query in queries for _ in range(self.sample_size)], generation_kwargs)
        offset = int(self.model.config.is_encoder_decoder)  # its responses begin with the decoder's start token
        samples = []
        for row, response in enumerate(responses):
            query, completion = queries[row // self.sample_size].tolist(), response[offset:].tolist()
            samples.append(
                Sample(
                    prompt=self._text(query, skip_special_tokens),
                    completion=self._text(completion, skip_special_tokens),
                    prompt_ids=tuple(query),
                    completion_ids=tuple(completion),
                    columns={},
                )
            )
        texts = [self._whole_text(sample, skip_special_tokens) for sample in samples]
        scores = totals(score_apart(self._reward(skip_special_tokens), samples))
        result = []
        for start in range(0, len(samples), self.sample_size):
            rows = [row for row in range(start, start + self.sample_size) if scores[row] is not None]
            rows.sort(key=lambda row: scores[row] or 0.0, reverse=True)  # stable: equal scores in order of sampling
            result.append(
                Candidates(
                    texts=[texts[row] for row in rows],
                    completions=[samples[row].completion for row in rows],
                    responses=[responses[row] for row in rows],
                    scores=[float(scores[row] or 0.0) for row in rows],
                )
            )
        return result

    def _queries(self, tokenized_query: Queries) -> list[Tensor]:
        """Returns the queries as 1-D tensors on the model's device, after checking them."""
        single = isinstance(tokenized_query, Tensor) or (
            len(tokenized_query) > 0 and all(isinstance(token, int) for token in tokenized_query)
        )
        rows: Sequence[Any] = [tokenized_query] if single else tokenized_query  # type: ignore[assignment]
        if not len(rows):
            raise ValueError("tokenized_query is empty; expected at least one query")
        queries = [torch.as_tensor(row, device=self.model.device) for row in rows]
        vocabulary = vocabulary_sizes(self.model)[0]
        for i, query in enumerate(queries):
            if query.dim() != 1 or not len(query) or query.is_floating_point() or query.is_complex():
                raise ValueError(
                    f"query {i} has shape {list(query.shape)} and dtype {query.dtype}; expected a 1-D list or tensor "
                    "of token ids; split a batch into a list, without its padding"
                )
            if int(query.min()) < 0 or (vocabulary is not None and int(query.max()) >= vocabulary):
                raise ValueError(
                    f"query {i} has token ids from {int(query.min())} to {int(query.max())}; the model has {vocabulary}"
                )
        return [query.long() for query in queries]

    def _sample(self, queries: list[Tensor], generation_kwargs: dict[str, Any]) -> list[Tensor]:
        """Samples one response to each of the repeated queries, as one batch."""
        model, lengths = self.model, [len(query) for query in queries]
        if self.length_sampler is not None and "max_new_tokens" in generation_kwargs:
            raise ValueError("max_new_tokens and length_sampler both set the length: pass length_sampler=None")
        pad_token = int(self.tokenizer.pad_token_id or 0)  # any will do: masks come from lengths
        kwargs = dict(generation_kwargs)
        if self.gen_config is not None:
            kwargs.setdefault("generation_config", self.gen_config)
        if effective(None, kwargs, "pad_token_id") is None:
            kwargs["pad_token_id"] = pad_token
        check_sampling(model.generation_config, kwargs)
        if self.sample_size > 1 and not effective(model.generation_config, kwargs, "do_sample"):
            warnings.warn(
                f"do_sample is not set: all {self.sample_size} responses to a query are the same; pass do_sample=True",
                stacklevel=4,
            )
        seq2seq = bool(model.config.is_encoder_decoder)
        limits = new_token_limits(
            model.generation_config,
            kwargs,
            lengths,
            batch_size=self.sample_size,
            length_sampler=self.length_sampler,
            is_encoder_decoder=seq2seq,
        )
        if limits is not None:
            each = slice(None, None, self.sample_size)  # so that an error names the query's own index
            check_context(lengths[each], limits[each], context_length(model), is_encoder_decoder=seq2seq)
        with eval_mode(model):
            choice = choose_engine(
                model,
                kwargs,
                limits,
                tokenizer=self.tokenizer,
                pad_token=pad_token,
                batch_size=self.sample_size,
                limits_are_drawn=self.length_sampler is not None,
            )
            seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
            return rollout_rows(choice.engine.generate(queries, replace(choice.request, seed=seed)))[1]

    def _reward(self, skip_special_tokens: bool) -> Reward:
        if not _takes_texts(self.queries_to_scores):
            return as_reward(self.queries_to_scores)

        def scores(samples: Sequence[Sample]) -> Any:
            return self.queries_to_scores([self._whole_text(sample, skip_special_tokens) for sample in samples])

        return as_reward(scores, name="queries_to_scores", rows_per_call=self.sample_size)

    def _whole_text(self, sample: Sample, skip_special_tokens: bool) -> str:
        if self.model.config.is_encoder_decoder:
            return sample.completion
        return self._text([*sample.prompt_ids, *sample.completion_ids], skip_special_tokens)

    def _text(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))


def _takes_texts(scorer: Any) -> bool:
    """Whether a scorer is a function of a list of texts, as in TRL 0.4, rather than a reward of `trl.rewards`."""
    if not callable(scorer) or callable(getattr(scorer, "score", None)):
        return False
    try:
        signature = inspect.signature(scorer)
        signature.bind([])
    except ValueError:  # a builtin without a signature
        return True
    except TypeError:  # needs more arguments than one
        return False
    return not {"samples", "completions"} & set(signature.parameters)


def _same_device(given: torch.device, actual: torch.device) -> bool:
    return given.type == actual.type and given.index in (None, actual.index)


if not TYPE_CHECKING:  # type checkers go on refusing unknown names
    __getattr__ = legacy.lookup(__name__)
