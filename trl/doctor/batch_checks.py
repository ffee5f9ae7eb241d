"""Checks of one batch of real responses, evaluated by the trainer, before its update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl.doctor.codes import finding
from trl.doctor.setting_checks import is_sharded
from trl.functional import masked_sum
from trl.health import METRICS
from trl.models import evaluate
from trl.models.trunk import base_language_model
from trl.rollout.assembly import assemble
from trl.state.rng import preserved_generators
from trl.trackers.findings import Finding
from trl.training.modes import eval_mode
from trl.training.run_state import Learner

# Rows and response tokens that are computed again: a few percent of a step, once.
_ROWS, _TOKENS = 4, 32
# Means of |difference| in nats per token. float32 rounds at 1e-6 and bfloat16 at 0.015 in the embedded model; the clip
# range of PPO is 0.2, of which 0.1 is half.
_LOGPROB_GAP = 0.1
_PADDING_GAP = 0.1
_DTYPE_GAP = 3e-4
_DROPOUT_GAP = 0.02  # a tenth of the clip range; a dropout of 0.1 gives 1.4 in the embedded model
# The surprise of true samples has the entropy as its mean. Six standard errors are one false alarm in 5e8 batches, and
# 0.05 nats per token leave room for rounding.
_SURPRISE_ERRORS, _SURPRISE, _SURPRISE_TOKENS = 6.0, 0.05, 200
# KL before the first update: twice the target is where the healthy band of a run ends (trl.health). Without a target,
# half a nat per token: the demo's policy, trained, stays below 0.4, and another model of its size is at 4.
_REFERENCE_TARGETS, _REFERENCE_PER_TOKEN = 2.0, 0.5
_VALUE_FACTOR = 10.0  # TRL 0.4's wide initialisation predicts about ±5 for rewards of ±1
_LEAST_GROUPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A batch of `B` responses as the trainer evaluates them before the update."""

    queries: Sequence[Tensor]  # 1-D
    responses: Sequence[Tensor]  # 1-D; an encoder-decoder's begin with the decoder's start token
    mask: Tensor  # [B, S]
    logprobs: Tensor  # [B, S]
    ref_logprobs: Tensor | None  # [B, S]
    entropy: Tensor | None  # [B, S]; None if unknown
    values: Tensor | None  # [B, S]
    scores: Sequence[float | None]  # B totals; empty without a reward
    groups: Sequence[int]  # equal for responses to one prompt
    sampler_logprobs: Tensor | None = None  # [B, S] if the caller gave them
    fresh: bool = True  # whether the policy has not been trained yet


def check_batch(trainer: Learner, look: Look) -> list[Finding]:
    """Looks at a batch of real responses. One process may call this; nothing is changed."""
    checks: list[Callable[[Learner, Look], Iterator[Finding]]] = [_surprise, _given_gap, _reference, _values, _groups]
    if not is_sharded(trainer):
        checks += [_logprobs, _dropout]
    return [found for check in checks for found in check(trainer, look)]


def _surprise(trainer: Learner, look: Look) -> Iterator[Finding]:
    """A martingale test: given the tokens before it, a sample's -log p exceeds the entropy by 0 on average."""
    if look.entropy is None or look.sampler_logprobs is not None:
        return
    excess = (-look.logprobs - look.entropy)[look.mask].double()
    if len(excess) < _SURPRISE_TOKENS:
        return
    mean = float(excess.mean())
    error = math.sqrt(float(excess.square().sum())) / len(excess)
    if abs(mean) > max(_SURPRISE, _SURPRISE_ERRORS * error):
        kind = "too likely" if mean < 0 else "too unlikely"
        yield finding(
            "sampler-mismatch",
            f"Over {len(excess)} tokens, -log p exceeds the entropy by {mean:+.3f} ± {error:.3f} nats per token; "
            f"samples of the policy give 0: these are {kind}",
        )


def _given_gap(trainer: Learner, look: Look) -> Iterator[Finding]:
    if look.sampler_logprobs is None:
        return
    gap = float((look.logprobs - look.sampler_logprobs)[look.mask].abs().mean())
    if gap > _LOGPROB_GAP:
        yield finding(
            "sampler-gap", f"sampler_logprobs and the trainer's differ by {gap:.3f} nats per token on average"
        )


def _reference(trainer: Learner, look: Look) -> Iterator[Finding]:
    if look.ref_logprobs is None or not look.fresh:
        return
    kl = masked_sum(look.logprobs - look.ref_logprobs, look.mask, dim=1)
    counted = look.mask.any(dim=1)
    mean, tokens = float(kl[counted].mean()), float(look.mask[counted].sum(dim=1).float().mean())
    config = trainer.config
    if trainer._trl_stats_prefix == "ppo" and config.adap_kl_ctrl:
        bound, reason = _REFERENCE_TARGETS * float(config.target), f"the target is {config.target:g}"
        bound = max(bound, _REFERENCE_PER_TOKEN * tokens)
    else:
        bound, reason = _REFERENCE_PER_TOKEN * tokens, "a copy of the policy gives 0"
    if mean > bound:
        yield finding("reference-differs", f"KL of {mean:.3g} nats per response of {tokens:.0f} tokens; {reason}")


def _values(trainer: Learner, look: Look) -> Iterator[Finding]:
    """Values against the largest return that scores and KL penalty can make."""
    known = [abs(score) for score in look.scores if score is not None]
    if look.values is None or not known:
        return
    kl = 0.0
    if look.ref_logprobs is not None:
        kl = float(masked_sum(look.logprobs - look.ref_logprobs, look.mask, dim=1).abs().max())
    largest = max(known) + float(trainer.kl_ctl.value) * kl
    size = float(look.values[look.mask].square().mean().sqrt())
    if size > _VALUE_FACTOR * (1 + largest):
        yield finding(
            "value-head-scale", f"Values of ±{size:.3g} (root mean square) for returns of at most {largest:.3g}"
        )


def _groups(trainer: Learner, look: Look) -> Iterator[Finding]:
    groups: dict[int, set[float]] = {}
    for group, score in zip(look.groups, look.scores, strict=False):
        if score is not None:
            groups.setdefault(group, set()).add(score)
    size, scored = int(trainer.config.group_size), list(groups.values())
    if size == 1 or len(scored) < _LEAST_GROUPS or any(len(scores) > 1 for scores in scored):
        return
    if len(set.union(*scored)) > 1:  # else the reward is constant, which is told by itself
        yield finding("constant-groups", f"{len(scored)} of {len(scored)} groups of {size} responses")


def _logprobs(trainer: Learner, look: Look) -> Iterator[Finding]:
    """The same tokens by three ways: the trainer's batch, the sampler's decoding loop, and a pass of their own."""
    rows = _longest_and_shortest(trainer, look)
    if not rows:
        return
    trained = [look.logprobs[row][look.mask[row]][:_TOKENS] for row in rows]
    queries = [look.queries[row] for row in rows]
    start = int(trainer.is_encoder_decoder)
    responses = [look.responses[row][: start + _TOKENS] for row in rows]
    with trainer._trl_evaluator().evaluating():
        alone = [_alone(trainer, q, r) for q, r in zip(queries, responses, strict=True)]
    sampled = trainer._trl_replay(queries, responses)
    own_gap, gap = _gap(trained, alone), 0.0 if sampled is None else _gap(trained, sampled)
    if own_gap > _PADDING_GAP:
        yield finding(
            "padding-changes-logprobs",
            f"Log-probabilities of {len(rows)} responses in the batch and alone differ by {own_gap:.3f} nats per token",
        )
    elif gap > _DTYPE_GAP and trainer._trl_compute.narrow:
        with torch.no_grad(), eval_mode(trainer.model):  # on the weights as stored
            stored = [_alone(trainer, q, r) for q, r in zip(queries, responses, strict=True)]
        if _gap(trained, stored) < 0.1 * gap:
            yield finding(
                "dtype-mismatch",
                "The trainer's log-probabilities are those of the stored float32 weights, to "
                f"{_gap(trained, stored):.1g} nats; the sampler computes in "
                f"{str(trainer._trl_compute.dtype).removeprefix('torch.')} and differs by {gap:.2g} nats per token",
            )
    if own_gap <= _PADDING_GAP and gap > _LOGPROB_GAP:
        yield finding("sampler-gap", f"The same {sum(map(len, trained))} tokens differ by {gap:.3f} nats per token")


def _dropout(trainer: Learner, look: Look) -> Iterator[Finding]:
    """Runs a few rows in the modes that the update will run in; what that draws is taken back."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    trunk = base_language_model(policy)
    rows = _longest_and_shortest(trainer, look)[:2]
    if not rows or not any(module.training for module in trunk.modules()):
        return
    queries, responses = [look.queries[row] for row in rows], [look.responses[row] for row in rows]
    with preserved_generators(trainer.accelerator.device, trainer._trl_generator), torch.no_grad():
        training = [_alone(trainer, q, r) for q, r in zip(queries, responses, strict=True)]
        with eval_mode(policy):
            plain = [_alone(trainer, q, r) for q, r in zip(queries, responses, strict=True)]
    gap = _gap(training, plain)
    if gap > _DROPOUT_GAP:
        shares = {m.p for m in trunk.modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0}
        settings = f" (dropout of {', '.join(f'{p:g}' for p in sorted(shares))})" if shares else ""
        yield finding(
            "dropout-on", f"In the update's modes, log-probabilities move by {gap:.3f} nats per token{settings}"
        )


def _longest_and_shortest(trainer: Learner, look: Look) -> list[int]:
    """Up to four rows of which every token counts, the longest and the shortest first: their padding differs most."""
    start = int(trainer.is_encoder_decoder)
    counts = look.mask.sum(dim=1).tolist()
    whole = [row for row, response in enumerate(look.responses) if counts[row] == len(response) - start > 0]
    whole.sort(key=lambda row: len(look.queries[row]) + len(look.responses[row]))
    return list(dict.fromkeys([*whole[-1:], *whole[:1], *whole[-2:-1], *whole[1:2]]))[:_ROWS]


def _alone(trainer: Learner, query: Tensor, response: Tensor) -> Tensor:
    """Log-probabilities `[R]` of a response in a pass of its own, without padding, by the unwrapped policy."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    query, response = query.to(trainer.current_device), response.to(trainer.current_device)
    context, sampled, encoded = query, response, None
    if trainer.is_encoder_decoder:
        context, sampled, encoded = response[:1], response[1:], [query]
    rollout = assemble([context], [sampled], pad_token=0, side="right", encoded=encoded)
    evaluation = evaluate(policy, rollout, temperature=trainer.config.temperature, values=False)
    return evaluation.logprobs[rollout.mask]


def _gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Mean absolute difference over the tokens of both."""
    differences = [(a.cpu() - b.cpu()).abs() for a, b in zip(first, second, strict=True)]
    return float(torch.cat(differences).mean())


def check_scores(scores: Sequence[float | None]) -> list[Finding]:
    """Finds a reward that scores too few responses, or all of them the same, on 8 samples or more."""
    known: list[Any] = [score for score in scores if score is not None]
    missing, findings = len(scores) - len(known), []
    if len(scores) >= 8 and missing > (METRICS["reward/excluded"].high or 0) * len(scores):
        findings.append(finding("samples-excluded", f"{missing} of {len(scores)} responses have no score"))
    if len(known) >= 8 and max(known) - min(known) <= 1e-6 * max(1.0, abs(known[0])):
        findings.append(finding("constant-reward", f"All {len(known)} scores are {known[0]:g}"))
    return findings
