"""Inputs of a managed run: prompts, generation settings and schedule, checked against the model's context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from trl.data import Prompt, column_fingerprints, fingerprint, load_prompts
from trl.models.limits import context_length
from trl.rollout import stop_strings, stop_tokens
from trl.runs.options import TrainOptions
from trl.training.processes import run_together, share_bytes
from trl.training.run_state import Learner

logger = logging.getLogger(__name__)

LengthSampler = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """Prompts, sampling settings and schedule of a run; the same on every process."""

    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    generation: Mapping[str, Any]  # arguments of the trainer's `generate`
    eval_generation: Mapping[str, Any]  # the same for held-out prompts: as long as a training response may become
    length_sampler: LengthSampler | None
    batch_size: int  # samples per step, over all processes
    group_size: int  # samples per prompt
    target: int  # total steps
    eval_every: int | None  # steps between evaluations; None for no evaluation
    save_every: int | None  # steps between checkpoints; None to save by the clock

    @classmethod
    def load(cls, trainer: Learner, options: TrainOptions, generation: Mapping[str, Any]) -> RunInputs:
        """Loads the prompts of a run. Every process must call this.

        Raises:
            ValueError: if prompts and responses do not fit into the model's context, or processes hold different
                prompts.
        """
        batch_size = int(trainer.config.batch_size) * trainer.accelerator.num_processes
        prompts = load_run_prompts(trainer, options.prompts, _max_response(options, generation))
        eval_generation = {**generation, "max_new_tokens": _eval_length(options, generation)}
        eval_prompts = load_run_prompts(trainer, options.eval_prompts, eval_generation["max_new_tokens"])
        check_same_prompts(trainer, [*prompts, *eval_prompts])
        return cls(
            prompts=prompts,
            eval_prompts=eval_prompts,
            generation=generation,
            eval_generation=eval_generation,
            length_sampler=_capped(options.length_sampler, trainer, prompts),
            batch_size=batch_size,
            group_size=int(trainer.config.group_size),
            target=options.target(batch_size),
            eval_every=options.evaluates_every(batch_size),
            save_every=options.saves_every(batch_size),
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the prompts' ids and tokens, which must not change when a run resumes."""
        return fingerprint(self.prompts)

    @cached_property
    def digests(self) -> dict[str, dict[str, str]]:
        """Digests of the data that may change when a run resumes: reward columns and held-out prompts."""
        held_out = {"ids and tokens": fingerprint(self.eval_prompts)} if self.eval_prompts else {}
        return {
            "columns of the prompts": column_fingerprints(self.prompts),
            "the held-out prompts": held_out | column_fingerprints(self.eval_prompts),
        }

    def resolved(self, options: TrainOptions) -> dict[str, Any]:
        """Options in effect, in a form that can be written to a file; prompts are given by their count."""
        given = {f.name: getattr(options, f.name) for f in fields(options)}
        for name in ("run_dir", "resume", "progress", "launch", "watch"):  # no effect on the results
            del given[name]
        return given | {
            "prompts": len(self.prompts),
            "eval_prompts": len(self.eval_prompts),
            "steps": self.target,
            "generation": self.generation,
            "eval_every": self.eval_every,
        }


@contextmanager
def run_settings(trainer: Learner, options: TrainOptions, generation: Mapping[str, Any]) -> Iterator[None]:
    """Sets `max_skipped_updates` and `stop_token_ids` during a run, where the configuration leaves them unset.

    Without the latter, a response ended by a stop token of `generation` would get the missing-EOS penalty.

    Raises:
        ValueError: if `missing_eos_penalty` is set and stop strings, which it does not see, end responses.
    """
    config, model = trainer.config, trainer.accelerator.unwrap_model(trainer.model)
    strings = stop_strings(model.generation_config, generation)
    if config.missing_eos_penalty is not None and strings:
        raise ValueError(
            f"missing_eos_penalty={config.missing_eos_penalty:g} would also apply to responses ended by "
            f"stop_strings={strings}, whose last token is not a stop token: drop one of the two settings, or end "
            "responses with stop tokens (generation={'eos_token_id': ...})"
        )
    stops = set(stop_tokens(model.generation_config, generation))
    adjusted: dict[str, Any] = {}
    if config.max_skipped_updates is None:
        adjusted["max_skipped_updates"] = options.max_skipped_updates
    if config.stop_token_ids is None and stops != set(trainer._trl_stop_tokens()):
        adjusted["stop_token_ids"] = sorted(stops)
    for name, value in adjusted.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in adjusted:
            setattr(config, name, None)


def load_run_prompts(trainer: Learner, source: Any, new_tokens: int) -> list[Prompt]:
    """Loads prompts, requiring that each leaves room for `new_tokens` in the context; [] if there is no source."""
    if source is None:
        return []
    context = context_length(trainer.model)  # for an encoder-decoder, the decoder's, which includes its start token
    if context is not None and context - new_tokens < 1:
        item = "the decoder's start token" if trainer.is_encoder_decoder else "a prompt"
        raise ValueError(
            f"max_new_tokens={new_tokens} leaves no room for {item} in the model's context of {context} tokens"
        )
    if trainer.is_encoder_decoder:
        room = context_length(trainer.model, encoder=True)
    else:
        room = None if context is None else context - new_tokens
    return run_together(
        trainer.accelerator, lambda: load_prompts(source, trainer.tokenizer, max_tokens=room), ValueError
    )


def check_same_prompts(trainer: Learner, prompts: list[Prompt]) -> None:
    """Checks that all processes hold the same prompts, since each picks its share of a batch by index.

    Raises:
        ValueError: if they differ, for example because a stream was split between processes.
    """
    if len(set(share_bytes(trainer.accelerator, fingerprint(prompts).encode()))) > 1:
        raise ValueError("the prompts differ between processes: give every process all prompts, in the same order")


def _values_of(sampler: LengthSampler | None) -> list[int]:
    """Lengths that a sampler may draw, if it lists them like `LengthSampler.values`; otherwise []."""
    values = getattr(sampler, "values", None)
    return values if isinstance(values, list) else []


def _max_response(options: TrainOptions, generation: Mapping[str, Any]) -> int:
    """Maximum number of new tokens per response, as far as it is known before sampling."""
    if values := _values_of(options.length_sampler):
        return max(values)
    if options.length_sampler is None:
        return int(generation["max_new_tokens"])
    # The range of a custom sampler is unknown; only require that prompts leave room for some response.
    return int((options.generation or {}).get("max_new_tokens", 1))


def _eval_length(options: TrainOptions, generation: Mapping[str, Any]) -> int:
    """New tokens per response to a held-out prompt: as given, else the most that a length sampler lists."""
    default = int(generation["max_new_tokens"])
    given = "max_new_tokens" in (options.generation or {})
    return default if given else max(_values_of(options.length_sampler), default=default)


def _capped(sampler: LengthSampler | None, trainer: Learner, prompts: list[Prompt]) -> LengthSampler | None:
    """Caps a length sampler of unknown range to the room that the longest prompt leaves.

    Logs a warning the first time the cap applies.
    """
    context = context_length(trainer.model)
    if sampler is None or _values_of(sampler) or context is None:
        return sampler
    longest_prompt = 1 if trainer.is_encoder_decoder else max(len(prompt.tokens) for prompt in prompts)
    room, warned = context - longest_prompt, False

    def capped() -> int:
        nonlocal warned
        length = int(sampler())
        if length > room and not warned:
            warned = True
            logger.warning(
                "length_sampler drew %d new tokens, but the longest prompt has %d tokens and leaves room for %d in the "
                "model's context of %d: lengths are capped at %d",
                length, longest_prompt, room, context, room,
            )  # fmt: skip
        return min(length, room)

    return capped
