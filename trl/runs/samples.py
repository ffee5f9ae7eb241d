"""Sampling, scoring, gathering and recording the completions of a managed run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from trl.data import Prompt
from trl.protocols import Reward
from trl.rewards.compose import score_apart
from trl.rewards.isolation import drawing_from
from trl.rollout import stop_strings, stop_tokens
from trl.runs.token_records import TokenRecord
from trl.state.rng import seeded_generators
from trl.trackers import CompletionRecord
from trl.training.processes import run_together, share_json
from trl.training.run_state import Learner
from trl.types import Sample, Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """This process's prompts and the policy's responses to them."""

    prompts: list[Prompt]
    responses: list[Tensor]  # in the form `step` takes: an encoder-decoder's begin with the decoder's start token
    samples: list[Sample]  # in the form rewards take
    finished: list[bool]  # whether a stop token or stop string ended the response

    @property
    def queries(self) -> list[Tensor]:
        """Prompts as 1-D tensors of token ids."""
        return [prompt.tokens for prompt in self.prompts]


def draw(
    trainer: Learner,
    prompts: Sequence[Prompt],
    generation: Mapping[str, Any],
    length_sampler: Any = None,
    *,
    base: bool = False,
) -> Drawn:
    """Samples a response to each prompt with the trainer's `generate`; if `base`, from the reference."""
    queries = [prompt.tokens.to(trainer.current_device) for prompt in prompts]
    sample = trainer._trl_generate_from_reference if base else trainer.generate
    responses = list(sample(queries, length_sampler, return_prompt=False, **generation))
    completions = [response[int(trainer.is_encoder_decoder) :].tolist() for response in responses]
    texts = [trainer.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]
    config = trainer.accelerator.unwrap_model(trainer.model).generation_config
    stops, strings = set(stop_tokens(config, generation)), stop_strings(config, generation)
    samples = [
        Sample(
            prompt=prompt.text,
            completion=text,
            prompt_ids=tuple(prompt.tokens.tolist()),
            completion_ids=tuple(tokens),
            columns=prompt.columns,
        )
        for prompt, text, tokens in zip(prompts, texts, completions, strict=True)
    ]
    finished = [
        bool(tokens) and (tokens[-1] in stops or _contains_any(strings, trainer.tokenizer, tokens))
        for tokens in completions
    ]
    return Drawn(prompts=list(prompts), responses=responses, samples=samples, finished=finished)


def _contains_any(strings: Sequence[str], tokenizer: Any, tokens: Sequence[int]) -> bool:
    """Whether a response contains one of the stop `strings`, the first of which ends it."""
    text = tokenizer.decode(tokens) if strings else ""
    return any(string in text for string in strings)


def score_samples(trainer: Learner, reward: Reward, drawn: Drawn, stream: str) -> Scored:
    """Scores samples; a failure on one process fails on all.

    The reward has its own random streams, isolated from the run's generators and seeded by the run's seed, the process
    rank and `stream` (such as "step/12").
    """
    stream = f"{trainer.config.seed or 0}/{stream}/{trainer.accelerator.process_index}"
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:7], "big")

    def score() -> Scored:
        with seeded_generators(seed, trainer.accelerator.device, trainer._trl_generator), drawing_from(stream):
            return score_apart(reward, drawn.samples)

    return run_together(trainer.accelerator, score)


def totals(scored: Scored) -> list[float | None]:
    """Total per sample: the score plus the sum of its token rewards; None for a sample without a score."""
    return [
        None if score is None else score + math.fsum(tokens or ())
        for score, tokens in zip(scored.scores, scored.token_rewards, strict=True)
    ]


def prepare_arguments(
    drawn: Drawn, scored: Scored, *, masks: bool, token_rewards: bool, offset: int, group_size: int
) -> dict[str, Any]:
    """Builds the arguments of `prepare`. A sample without a score is masked out, so that the batch keeps its size.

    Args:
        drawn: the samples.
        scored: their scores.
        masks: whether any sample on any process has no score.
        token_rewards: whether any sample on any process has token rewards.
        offset: number of unsampled tokens at the start of a response: 1 for an encoder-decoder, else 0.
        group_size: number of successive samples that answer the same prompt.
    """
    arguments: dict[str, Any] = {
        "queries": drawn.queries,
        "responses": drawn.responses,
        "scores": [
            torch.tensor(0.0 if score is None else float(score), dtype=torch.float32) for score in scored.scores
        ],
        "group": [i // group_size for i in range(len(drawn.responses))],
    }
    if masks:
        arguments["response_masks"] = [
            torch.full_like(response, int(score is not None))
            for response, score in zip(drawn.responses, scored.scores, strict=True)
        ]
    if token_rewards:
        arguments["token_rewards"] = [
            torch.tensor([0.0] * offset + list(tokens or [0.0] * (len(response) - offset)), dtype=torch.float)
            for response, tokens in zip(drawn.responses, scored.token_rewards, strict=True)
        ]
    return arguments


def gather_scored(accelerator: Any, scored: Scored) -> Scored:
    """Gathers every rank's `Scored`, concatenated in rank order. Every process must call this."""
    parts = share_json(accelerator, asdict(scored))
    names = list(dict.fromkeys(name for part in parts for name in part["components"]))
    return Scored(
        **{
            field: [value for part in parts for value in part[field]]
            for field in ("scores", "token_rewards", "seconds", "errors", "tracebacks")
        },
        components={
            name: [v for part in parts for v in part["components"].get(name, [None] * len(part["scores"]))]
            for name in names
        },
    )


def gather_records(
    accelerator: Any,
    drawn: Drawn,
    scored: Scored,
    *,
    kl: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
    tokens: Mapping[int, TokenRecord] = MappingProxyType({}),
) -> list[CompletionRecord]:
    """Gathers a record of every sample of every process. Every process must call this.

    Args:
        accelerator: spans the processes.
        drawn: this process's samples.
        scored: their scores.
        kl: KL to the reference per sample, summed over tokens; None if unknown.
        advantages: advantage per sample, averaged over tokens; None if unknown.
        tokens: per-token records of some of this process's samples, by row.
    """
    local_records = [
        {
            "prompt_id": drawn.prompts[i].id,
            "prompt": sample.prompt,
            "completion": sample.completion,
            "rewards": {name: values[i] for name, values in scored.components.items()},
            "score": total,
            "advantage": None if advantages is None or total is None else float(advantages[i]),
            "kl": None if kl is None or total is None else float(kl[i]),
            "length": len(sample.completion_ids),
            "finish_reason": "stop" if drawn.finished[i] else "length",
            "reward_seconds": scored.seconds[i],
            "error": scored.errors[i],
            "tokens": tokens.get(i),
        }
        for i, (sample, total) in enumerate(zip(drawn.samples, totals(scored), strict=True))
    ]
    parts = share_json(accelerator, local_records)
    return [CompletionRecord(**fields) for part in parts for fields in part]
