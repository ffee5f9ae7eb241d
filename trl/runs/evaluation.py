"""Evaluation on held-out prompts: of the policy during a run, and of the trained policy against its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trl.data import Prompt
from trl.protocols import Reward
from trl.runs.samples import draw, score_samples, totals
from trl.state.rng import seeded_generators
from trl.training.processes import share_json
from trl.training.run_state import Learner
from trl.types import mean_and_std


class NothingScored(RuntimeError):
    """Raised when no sample has a score: in several consecutive batches of a run, or in an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredResponse:
    """A response to a held-out prompt, its score and statistics."""

    score: float | None  # None: the reward gave none
    kl: float  # nats to the reference; NaN without one
    length: int  # tokens
    finished: bool  # whether a stop token or stop string ended it
    prompt: str = ""
    completion: str = ""
    error: str | None = None


def respond_and_score(
    trainer: Learner,
    prompts: Sequence[Prompt],
    reward: Reward,
    generation: Mapping[str, Any],
    *,
    seed: int,
    base: bool = False,
) -> list[ScoredResponse]:
    """Samples and scores a response to each prompt, split over the processes, which must all call this.

    The random numbers follow from `seed`: the policy and its base get the same ones. The run's own generators and the
    models' modes are left unchanged.

    Args:
        trainer: samples from its policy or its reference.
        prompts: at least one prompt; the same list on every process.
        reward: scores the responses.
        generation: keyword arguments of `generate`.
        seed: of the random numbers.
        base: sample from the reference instead of the policy.

    Returns:
        One entry per prompt, in order, the same on every process.
    """
    accelerator, batch_size = trainer.accelerator, int(trainer.config.batch_size)
    share = math.ceil(len(prompts) / accelerator.num_processes)
    first = accelerator.process_index * share
    local: list[ScoredResponse] = []
    with seeded_generators(seed, accelerator.device, trainer._trl_generator):
        for start in range(0, share, batch_size):
            # Every process must run the same number of forward passes, since wrapped models communicate in them.
            # Surplus rows are computed but not counted.
            indices = range(first + start, first + min(start + batch_size, share))
            drawn = draw(trainer, [prompts[i % len(prompts)] for i in indices], generation, base=base)
            scored = score_samples(trainer, reward, drawn, f"evaluation/{start}")
            kl = None if base else trainer.reference_kl(drawn.queries, drawn.responses)
            kls = [math.nan] * len(drawn.samples) if kl is None else kl.tolist()
            batch = zip(drawn.samples, drawn.finished, totals(scored), scored.errors, kls, strict=True)
            local += [
                ScoredResponse(
                    score=score,
                    kl=kl,
                    length=len(sample.completion_ids),
                    finished=finished,
                    prompt=sample.prompt,
                    completion=sample.completion,
                    error=error,
                )
                for i, (sample, finished, score, error, kl) in zip(indices, batch, strict=True)
                if i < len(prompts)
            ]
    parts = share_json(accelerator, [asdict(response) for response in local])
    return [ScoredResponse(**fields) for part in parts for fields in part]


def evaluate_prompts(
    trainer: Learner, prompts: Sequence[Prompt], reward: Reward, generation: Mapping[str, Any]
) -> dict[str, float]:
    """Samples and scores held-out prompts with the same random numbers every time; see `respond_and_score`.

    Returns:
        Metrics, identical on every process. Over the prompts with a score: `eval/score_mean` and `eval/score_std`
        (population standard deviation), NaN if no prompt has a score. Over all prompts: `eval/kl` (nats per response;
        NaN without a reference), `eval/length` (tokens), `eval/finished` (fraction ended by a stop token or stop
        string) and `eval/excluded` (fraction without a score).
    """
    rows = respond_and_score(trainer, prompts, reward, generation, seed=int(trainer.config.seed or 0))
    known = [row.score for row in rows if row.score is not None]
    mean, std = mean_and_std(known)
    return {
        "eval/score_mean": mean,
        "eval/score_std": std,
        "eval/kl": math.fsum(row.kl for row in rows) / len(rows),
        "eval/length": math.fsum(row.length for row in rows) / len(rows),
        "eval/finished": math.fsum(row.finished for row in rows) / len(rows),
        "eval/excluded": 1 - len(known) / len(rows),
    }
