"""Evaluation of the policy on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl.data import Prompt
from trl.protocols import Reward
from trl.runs.rows import mean_and_std
from trl.runs.samples import draw, judge, totals
from trl.state.rng import own_numbers
from trl.training.processes import share_json
from trl.training.run_state import Learner


def evaluate_prompts(
    trainer: Learner, prompts: Sequence[Prompt], reward: Reward, generation: Mapping[str, Any]
) -> dict[str, float]:
    """Samples and scores held-out prompts, split over the processes, with the same random numbers every time.

    The run's own random generators are left unchanged.

    Args:
        trainer: a PPOTrainer.
        prompts: at least one prompt; the same list on every process.
        reward: the reward used in training.
        generation: keyword arguments of `PPOTrainer.generate`.

    Returns:
        Metrics, identical on every process. Over the prompts with a score: `eval/score_mean` and `eval/score_std`
        (population standard deviation), NaN if no prompt has a score. Over all prompts: `eval/kl` (nats per response;
        NaN without a reference), `eval/length` (tokens), `eval/finished` (fraction ended by a stop token or stop string)
        and `eval/excluded` (fraction without a score).
    """
    accelerator, batch_size = trainer.accelerator, int(trainer.config.batch_size)
    share = math.ceil(len(prompts) / accelerator.num_processes)
    first = accelerator.process_index * share
    rows: list[tuple[float | None, float, int, bool]] = []  # score, KL, length, finished
    with own_numbers(int(trainer.config.seed or 0), accelerator.device, trainer._trl_generator):
        for start in range(0, share, batch_size):
            # Every process must run the same number of forward passes, since wrapped models communicate in them.
            # Surplus rows are computed but not counted.
            indices = range(first + start, first + min(start + batch_size, share))
            drawn = draw(trainer, [prompts[i % len(prompts)] for i in indices], generation)
            scores = totals(judge(trainer, reward, drawn, f"evaluation/{start}"))
            lengths = [len(sample.completion_ids) for sample in drawn.samples]
            kl = trainer.reference_kl(drawn.queries, drawn.responses)
            kls = [math.nan] * len(lengths) if kl is None else kl.tolist()
            batch_rows = zip(scores, kls, lengths, drawn.finished, strict=True)
            rows += [row for i, row in zip(indices, batch_rows, strict=True) if i < len(prompts)]
    return _summary([row for process_rows in share_json(accelerator, rows) for row in process_rows])


def _summary(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    known = [row[0] for row in rows if row[0] is not None]
    mean, std = mean_and_std(known)
    averages = {
        name: math.fsum(row[column] for row in rows) / len(rows)
        for column, name in enumerate(("eval/kl", "eval/length", "eval/finished"), start=1)
    }
    excluded = 1 - len(known) / len(rows)
    return {"eval/score_mean": mean, "eval/score_std": std, **averages, "eval/excluded": excluded}
