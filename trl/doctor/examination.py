"""`examine`: looks at a trainer before training. `examine_run`: looks at the records of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trl.data import Prompt
from trl.doctor.batch_checks import Look, check_batch, check_scores
from trl.doctor.codes import finding
from trl.doctor.row_checks import RowChecks
from trl.doctor.setting_checks import check_settings
from trl.doctor.watch import expects_end, unexplained
from trl.rewards import as_reward
from trl.rollout import same_queries
from trl.runs.inputs import load_run_prompts
from trl.runs.options import check_generation, generation_for
from trl.runs.samples import Drawn, draw, score_samples, totals
from trl.state.rng import seeded_generators
from trl.trackers import read_config, read_findings, read_metrics
from trl.trackers.findings import Finding
from trl.training.run_state import Learner

_MOST_SAMPLES = 64


def examine(
    trainer: Learner,
    prompts: Any,
    reward: Any = None,
    generation: Mapping[str, Any] | None = None,
    *,
    responses: Sequence[Tensor] | None = None,
    scores: Sequence[float] | None = None,
    sampler_logprobs: Sequence[Tensor] | None = None,
) -> list[Finding]:
    """Looks at a trainer's models and settings and at one batch of responses, before training.

    Changes nothing: neither weights, nor random generators, nor modes. With several processes, every process must call
    it. Managed runs are examined without asking (`train(doctor=True)`); for a loop of your own around `step`, call this
    once with the first batch:

        for finding in trl.doctor.examine(trainer, queries, responses=responses, scores=scores):
            print(finding)

    Args:
        trainer: a PPOTrainer or an OnlineTrainer.
        prompts: anything `trl.data.load_prompts` accepts, such as the queries of a batch.
        reward: anything `trl.rewards.as_reward` accepts; scores the responses.
        generation: arguments of `generate`, as for `train`; with `responses`, those that they were sampled with.
        responses: one per prompt, in the form `step` takes. By default, up to 64 are sampled.
        scores: one per response, instead of `reward`.
        sampler_logprobs: as for `step`, with `responses`.

    Returns:
        Findings at step 0; [] if nothing is wrong.

    Raises:
        ValueError: if an argument is invalid.
    """
    check_generation(generation)
    if responses is None and (scores is not None or sampler_logprobs is not None):
        raise ValueError(
            "scores and sampler_logprobs belong to responses: pass these as well, or pass a reward instead"
        )
    if responses is None:
        arguments = generation_for(generation, trainer.config.temperature, trainer._trl_stop_tokens())
        loaded = load_run_prompts(trainer, prompts, int(arguments["max_new_tokens"]))
    else:
        arguments = dict(generation or {})
        loaded = load_run_prompts(trainer, prompts, 1)
        if len(responses) != len(loaded) or (scores is not None and len(scores) != len(loaded)):
            counts = f"{len(responses)} responses and {'no' if scores is None else len(scores)} scores"
            raise ValueError(f"there are {len(loaded)} prompts, but {counts}: pass one of each per prompt")
    findings = check_settings(trainer, loaded, arguments)
    if any(found.code == "not-causal" for found in findings):
        return findings  # no response can be evaluated
    if responses is None:
        drawn, totalled = _sample(trainer, loaded, reward, arguments)
        queries, responses = drawn.queries, drawn.responses
        if not any(drawn.finished) and len(drawn.finished) >= 8 and _expects_end(trainer, loaded, generation or {}):
            limit = arguments["max_new_tokens"]
            findings.append(finding("truncated", f"{len(responses)} of {len(responses)} responses have {limit} tokens"))
    else:
        queries, totalled = [prompt.tokens for prompt in loaded], [float(score) for score in scores or ()]
    look = _evaluated(trainer, queries, responses, totalled, sampler_logprobs)
    return [*findings, *unexplained(check_batch(trainer, look), findings), *check_scores(totalled)]


def _expects_end(trainer: Learner, prompts: Sequence[Prompt], generation: Mapping[str, Any]) -> bool:
    config = trainer.config
    named = config.missing_eos_penalty is not None or config.stop_token_ids or generation.get("eos_token_id")
    return bool(named) or expects_end(trainer, prompts, generation)


def _sample(
    trainer: Learner, prompts: Sequence[Prompt], reward: Any, arguments: Mapping[str, Any]
) -> tuple[Drawn, list[float | None]]:
    """Samples from up to 64 prompts, with random numbers of its own, and scores the responses."""
    size = int(trainer.config.group_size)
    groups = max(1, min(int(trainer.config.batch_size), _MOST_SAMPLES) // size)
    chosen = [prompts[i % len(prompts)] for i in range(groups) for _ in range(size)]
    with seeded_generators(int(trainer.config.seed or 0), trainer.accelerator.device, trainer._trl_generator):
        drawn = draw(trainer, chosen, arguments)
    if reward is None:
        return drawn, []
    source = as_reward(reward)
    try:
        return drawn, totals(score_samples(trainer, source, drawn, "examination"))
    finally:
        source.close()


def _evaluated(
    trainer: Learner,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    scores: Sequence[float | None],
    sampler_logprobs: Sequence[Tensor] | None,
) -> Look:
    device = trainer.current_device
    queries, responses = [q.to(device) for q in queries], [r.to(device) for r in responses]
    batch = trainer._trl_batch(queries, responses)
    evaluated = trainer._trl_evaluation(batch, trainer._trl_evaluator())(batch.rollout())
    return Look(
        queries=queries,
        responses=responses,
        mask=evaluated.rollout.mask,
        logprobs=evaluated.policy.logprobs,
        ref_logprobs=evaluated.ref_logprobs,
        entropy=evaluated.policy.entropy,
        values=evaluated.policy.values,
        scores=scores,
        groups=same_queries(queries).tolist(),
        sampler_logprobs=None if sampler_logprobs is None else batch.place(list(sampler_logprobs)),
        fresh=trainer._trl_steps_done == 0,
    )


def examine_run(path: str | Path) -> list[Finding]:
    """Looks at the records of a run: its findings so far, and what its metrics say. Needs no model.

    Safe while the run is being written.

    Args:
        path: run folder.

    Returns:
        Findings in the order of their steps, each code once; [] if nothing is wrong.

    Raises:
        ValueError: if the folder holds no run, or its settings or metrics cannot be read.
    """
    folder = Path(path)
    if not (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder} is not a run folder: it contains no metrics.jsonl")
    findings = read_findings(folder)
    checks = RowChecks(read_config(folder) or {})
    for row in read_metrics(folder):
        findings += [new for new in checks.see(row) if all(new.code != known.code for known in findings)]
    return sorted(findings, key=lambda found: found.step)
