"""Evaluation of the policy on held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trl.data import Prompt
from trl.protocols import Reward
from trl.runs.samples import draw, judge, totals
from trl.state.rng import own_numbers
from trl.training.processes import share_bytes
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
        NaN without a reference), `eval/length` (tokens), `eval/finished` (fraction ended by a stop token or stop string) and `eval/excluded` (fraction without a
        score).
    """
    size, world = int(trainer.config.batch_size), trainer.accelerator.num_processes
    rank, each = trainer.accelerator.process_index, math.ceil(len(prompts) / world)
    mine = range(rank * each, rank * each + each)
    rows: list[tuple[float | None, float, int, bool]] = []  # score, KL, length, finished
    with own_numbers(int(trainer.config.seed or 0), trainer.accelerator.device, trainer._generator):
        for start in range(0, each, size):
            # Every process must run the same number of forward passes, since wrapped models communicate in them.
            # Surplus rows are computed but not counted.
            chunk = mine[start : start + size]
            drawn = draw(trainer, [prompts[i % len(prompts)] for i in chunk], generation)
            scores = totals(judge(trainer, reward, drawn, f"evaluation/{start}"))
            lengths = [len(sample.completion_ids) for sample in drawn.samples]
            kl = trainer.reference_kl(drawn.queries, drawn.responses)
            kls = [math.nan] * len(lengths) if kl is None else kl.tolist()
            chunk_rows = zip(scores, kls, lengths, drawn.finished, strict=True)
            rows += [row for i, row in zip(chunk, chunk_rows, strict=True) if i < len(prompts)]
    told = share_bytes(trainer.accelerator, json.dumps(rows).encode())
    return _summary([tuple(row) for part in told for row in json.loads(part)])


def _summary(rows: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    known = [row[0] for row in rows if row[0] is not None]
    mean = math.fsum(known) / len(known) if known else math.nan
    spread = math.sqrt(math.fsum((score - mean) ** 2 for score in known) / len(known)) if known else math.nan
    averages = {
        name: math.fsum(row[column] for row in rows) / len(rows)
        for column, name in enumerate(("eval/kl", "eval/length", "eval/finished"), start=1)
    }
    excluded = 1 - len(known) / len(rows)
    return {"eval/score_mean": mean, "eval/score_std": spread, **averages, "eval/excluded": excluded}
