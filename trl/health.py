"""Catalogue of the metrics that tell whether a run is healthy: meaning, healthy band, and what to change outside of it.

The report, the doctor and the documentation are made from this table. docs/ppo.md defines each statistic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple


class Symptom(NamedTuple):
    """What it means when a metric leaves its healthy band."""

    symptom: str
    """A sentence for the reader of a report."""
    cause: str
    """The likely cause."""
    change: str
    """What to change, naming the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Healthy range of a metric; None leaves a side open."""

    low: float | None = None
    high: float | None = None
    reason: str = ""
    """Where the bounds come from."""

    def holds(self, value: float) -> bool:
        """Whether `value` is inside the band. NaN and infinities are outside."""
        if not math.isfinite(value):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One key of `metrics.jsonl` that a person should look at."""

    key: str
    title: str
    unit: str
    """"" for a plain number, "share" for a fraction from 0 to 1."""
    meaning: str
    low: float | None = None
    """Lower end of the healthy band, where it depends on no setting; None: open."""
    high: float | None = None
    too_low: Symptom | None = None
    too_high: Symptom | None = None
    reason: str = ""
    """Where the band comes from."""
    grace: int = 0
    """First steps of a run in which the metric is not judged."""
    advisory: bool = False
    """Outside the band may be as intended: worth a note, no sign of an unhealthy run by itself."""


_ROWS = (
    Metric(
        key="score/mean",
        title="Score, mean",
        unit="",
        meaning="Mean score of the batch, sampled before the step's update. The quantity that training raises.",
    ),
    Metric(key="score/median", title="Score, median", unit="", meaning="Median score of the batch."),
    Metric(key="score/p05", title="Score, 5th percentile", unit="", meaning="Score that 5% of the batch stay below."),
    Metric(
        key="score/p25",
        title="Score, 25th percentile",
        unit="",
        meaning="Score that a quarter of the batch stays below.",
    ),
    Metric(
        key="score/p75", title="Score, 75th percentile", unit="", meaning="Score that a quarter of the batch exceeds."
    ),
    Metric(key="score/p95", title="Score, 95th percentile", unit="", meaning="Score that 5% of the batch exceed."),
    Metric(
        key="score/std",
        title="Score, standard deviation",
        unit="",
        meaning="Spread of the scores in a batch. Advantages are differences between scores: no spread, no signal.",
        low=1e-6,
        too_low=Symptom(
            "Every sample of a batch got the same score.",
            "The reward is constant on what the policy writes, or it saturates at its best or worst value.",
            "Print the reward of a few samples. Use a reward that tells responses apart, or a higher `temperature`.",
        ),
        reason="equal scores carry no preference between responses",
    ),
    Metric(
        key="eval/score_mean",
        title="Evaluation score",
        unit="",
        meaning="Mean score on held-out prompts, sampled with the same random numbers each time.",
    ),
    Metric(
        key="eval_before/score_mean",
        title="Evaluation score before training",
        unit="",
        meaning="Mean score on held-out prompts before the first step, in the first row alone. `eval/score_mean` of "
        "the same row comes after that step's update.",
    ),
    Metric(
        key="eval/kl",
        title="Evaluation KL",
        unit="nats/response",
        meaning="KL from the reference on held-out prompts, summed over each response.",
    ),
    Metric(
        key="objective/kl",
        title="KL to the reference",
        unit="nats/response",
        meaning="Sum over a response's tokens of log policy - log reference, averaged over the batch. Starts at 0.",
        low=-1.0,
        too_low=Symptom(
            "The KL to the reference is clearly negative, which a true KL cannot be.",
            "Responses are sampled from another distribution than the update scores: top_k, top_p, min_length, "
            "repetition_penalty or another temperature; or padding is misplaced.",
            "Sample with the defaults of `generation`, and set the temperature in `PPOConfig.temperature` only.",
        ),
        too_high=Symptom(
            "The KL to the reference is far above its target: the policy has drifted away from the model it started "
            "from.",
            "The updates outrun the KL penalty, and the reward may be exploited.",
            "Lower `learning_rate` or `ppo_epochs`, raise `init_kl_coef`, or shorten `horizon` so that the coefficient "
            "follows faster. Read the best-scoring completions.",
        ),
        reason="a KL is not negative; -1 allows for sampling noise (`step` warns there)",
    ),
    Metric(
        key="objective/kl_coef",
        title="KL coefficient",
        unit="",
        meaning="Weight of the KL penalty in the rewards; the adaptive controller raises it while the KL is above "
        "target.",
    ),
    Metric(
        key="ppo/policy/entropy",
        title="Entropy",
        unit="nats/token",
        meaning="Mean entropy of the next-token distribution. Falls slowly as the policy makes up its mind.",
        low=0.02,
        too_low=Symptom(
            "The entropy has collapsed: the policy writes nearly the same text each time.",
            "The policy has found one kind of response that scores well and no longer explores.",
            "Lower `learning_rate` or `ppo_epochs`, raise `init_kl_coef`, and compare the completions of late steps.",
        ),
        too_high=Symptom(
            "The entropy has risen far above its start: the policy is losing its language.",
            "Updates are too large, or the KL penalty is too weak to hold the policy near the reference.",
            "Lower `learning_rate`, set `max_grad_norm=1.0`, raise `init_kl_coef`.",
        ),
        reason="0 is a policy that always writes the same token",
    ),
    Metric(
        key="ppo/policy/clipfrac",
        title="Clip fraction",
        unit="share",
        meaning="Share of tokens at which the clipped surrogate was the larger loss, so that they had no gradient.",
        high=0.3,
        too_high=Symptom(
            "Many tokens hit the clip range: updates are too large for the data that they are computed on.",
            "The learning rate is too high for this model, or a batch is reused for too many passes.",
            "Lower `learning_rate` (halve it), lower `ppo_epochs`, or use larger minibatches.",
        ),
        reason="clipped tokens have no gradient (Schulman et al. 2017, eq. 7); above 0.3 much of each batch is wasted",
    ),
    Metric(
        key="ppo/policy/mean_ratio",
        title="Probability ratio",
        unit="",
        meaning="Mean of new over old probability of the sampled tokens. Its expectation is 1.",
        low=0.8,
        high=1.25,
        too_low=Symptom(
            "The probability ratio is well below 1: the update makes its own samples unlikely.",
            "Updates are too large, or log-probabilities before and during the update differ (dropout, numeric "
            "precision).",
            "Lower `learning_rate`; run `trl doctor` to compare the log-probabilities.",
        ),
        too_high=Symptom(
            "The probability ratio is well above 1: the update has left the region that its samples describe.",
            "Updates are too large, or log-probabilities before and during the update differ (dropout, numeric "
            "precision).",
            "Lower `learning_rate` or `ppo_epochs`; `ratio_threshold` skips such optimizer steps.",
        ),
        reason="the expectation of π/π_old under π_old is 1",
    ),
    Metric(
        key="ppo/policy/approxkl",
        title="KL of the update",
        unit="nats/token",
        meaning="Mean of ½ (log π - log π_old)²: how far one step's update moves the policy.",
        high=0.1,
        too_high=Symptom(
            "A single step moves the policy far.",
            "The learning rate is too high or a batch is reused for too many passes.",
            "Lower `learning_rate` or `ppo_epochs`, or set `early_stopping=True`, which ends the passes at 1.5 · "
            "`target_kl`.",
        ),
        reason="the default `target_kl` of early stopping, 0.1 nats per token",
    ),
    Metric(
        key="ppo/loss/policy",
        title="Policy loss",
        unit="",
        meaning="Clipped surrogate loss. Its sign and size say little: advantages are whitened.",
    ),
    Metric(
        key="ppo/loss/value",
        title="Value loss",
        unit="",
        meaning="Half the squared error of the value head, clipped. Falls as the head learns the scale of the returns.",
    ),
    Metric(
        key="ppo/val/var_explained",
        title="Explained variance",
        unit="",
        meaning="1 - error / variance of the returns: 1 is a perfect value head, 0 no better than a constant.",
        low=-0.5,
        too_low=Symptom(
            "The value head predicts the returns worse than a constant would.",
            "It has not learnt the scale of the scores yet, or the scores jump from batch to batch.",
            "Give it time: `value_warmup_steps`, a higher `vf_coef`, a larger `cliprange_value`, or scores scaled to "
            "about ±1 (`use_score_scaling`).",
        ),
        reason="below 0 is worse than a constant; -0.5 allows for noise in small batches. Judged where scores still "
        "vary",
        grace=20,
    ),
    Metric(
        key="ppo/grad_norm",
        title="Gradient norm",
        unit="",
        meaning="Norm of the gradient before clipping, averaged over the step's optimizer steps.",
        too_high=Symptom(
            "The gradient is many times `max_grad_norm`, so that clipping sets the size of each update.",
            "A loss term has the wrong scale, often the value loss of unscaled scores.",
            "Scale the scores (`use_score_scaling`, `score_clip`) or lower `vf_coef`.",
        ),
    ),
    Metric(
        key="ppo/skipped_updates",
        title="Skipped optimizer steps",
        unit="share",
        meaning="Share of optimizer steps skipped because loss or gradient was not finite.",
        high=0.0,
        too_high=Symptom(
            "Optimizer steps were skipped because the loss or gradient was not finite.",
            "A score or log-probability overflowed, or the weights diverged.",
            "Look at the minibatches in dumps/, lower `learning_rate`, clip scores with `score_clip`.",
        ),
        reason="a healthy update is finite",
    ),
    Metric(
        key="ppo/learning_rate",
        title="Learning rate",
        unit="",
        meaning="The optimizer's learning rate during the step.",
    ),
    Metric(
        key="tokens/responses_len_mean",
        title="Response length",
        unit="tokens",
        meaning="Mean length of the responses.",
        low=2.0,
        too_low=Symptom(
            "Responses have shrunk to a token or two.",
            "The reward prefers short responses, or a missing penalty lets the policy end at once.",
            "Look at the completions; set `missing_eos_penalty` only with a reward that also values content.",
        ),
        reason="a response of one token carries one decision",
    ),
    Metric(
        key="tokens/truncated",
        title="Truncated responses",
        unit="share",
        meaning="Share of responses that were cut at `max_new_tokens` instead of ending with a stop token or string.",
        high=0.98,
        too_high=Symptom(
            "Practically every response is cut at `max_new_tokens`.",
            "The limit is too short for the answers, or the stop token of the tokenizer is not the model's. "
            "For free continuations of a text it is as intended.",
            "Raise `max_new_tokens`, check `stop_token_ids` and the chat template, or set `missing_eos_penalty`.",
        ),
        reason="a policy that never ends a response cannot learn when to end one",
        advisory=True,
    ),
    Metric(
        key="reward/errors",
        title="Reward errors",
        unit="share",
        meaning="Share of samples whose reward raised an error, timed out or returned no number.",
        high=0.0,
        too_high=Symptom(
            "The reward failed on some samples.",
            "The reward function raises, times out or returns no number for some texts.",
            'Filter the completions by "with an error" to see the messages; fix the reward for these texts.',
        ),
        reason="a reward should score every text",
    ),
    Metric(
        key="reward/excluded",
        title="Samples without a score",
        unit="share",
        meaning="Share of samples left out of the update because they have no score.",
        high=0.1,
        too_high=Symptom(
            "Many samples have no score and are left out of the update.",
            "The reward returns None or fails for them.",
            "Give these texts a score, or fix what makes the reward fail.",
        ),
        reason="above a tenth, the update no longer sees the batch that was sampled",
    ),
    Metric(
        key="run/skipped_batches",
        title="Skipped batches",
        unit="batches",
        meaning="Batches so far that the run did not learn from: no sample had a score, or the KL spiked.",
    ),
    Metric(
        key="run/rollbacks",
        title="Rollbacks",
        unit="",
        meaning="Times so far that a spike took the run back to a checkpoint.",
    ),
    Metric(
        key="time/tokens_per_second",
        title="Throughput",
        unit="tokens/s",
        meaning="Sampled tokens per second of a whole step, over all processes.",
    ),
    Metric(key="time/step", title="Seconds per step", unit="s", meaning="Wall-clock seconds of a step."),
    Metric(key="time/sample", title="Sampling", unit="s", meaning="Seconds spent on sampling responses."),
    Metric(key="time/score", title="Scoring", unit="s", meaning="Seconds spent in the reward."),
    Metric(
        key="time/learn", title="Learning", unit="s", meaning="Seconds spent on evaluating and updating the policy."
    ),
    Metric(key="time/eval", title="Evaluation", unit="s", meaning="Seconds spent on held-out prompts."),
    Metric(
        key="memory/peak_mb",
        title="Peak memory",
        unit="MiB",
        meaning="Most memory that the main process has held since it started. Levels off after a few steps, and starts "
        "anew when a run resumes.",
    ),
)

NOT_FINITE = Symptom(
    "A metric is not a finite number.",
    "A score, a log-probability or a weight has overflowed, and what was computed from it is lost.",
    "Look at the first step in which it happened and at the minibatches in dumps/; lower `learning_rate`, set "
    "`max_grad_norm=1.0`, clip scores with `score_clip`, and train in float32.",
)
"""What it means when a metric is NaN or infinite, which is outside of every healthy band."""


def measured(row: Mapping[str, Any], key: str) -> float | None:
    """The value of a metric in a row, in memory or of `metrics.jsonl`: NaN if it was not finite, None if it is missing.

    Means of scores count as missing where they are not finite: no sample had a score.

    Args:
        row: metrics row; in the file, a number that is not finite is null, and `nonfinite` lists its key.
        key: key of the row.
    """
    value = row.get(key)
    if value is None and key in row.get("nonfinite", ()):
        value = math.nan
    if not isinstance(value, int | float):
        return None
    if math.isfinite(value):
        return float(value)
    return None if key.startswith(("score/", "eval/")) else math.nan


def is_telling(row: Mapping[str, Any], key: str, largest_spread: float) -> bool:
    """Whether a metric can be judged in a row, by its band.

    Explained variance divides the value head's error by the variance of the returns. Once the scores of a batch are
    alike, as when the policy has solved its task, that variance is next to 0, and the ratio far below -1 however small
    the error.

    Args:
        row: metrics row.
        key: key of the metric.
        largest_spread: largest `score/std` of the run up to this row.
    """
    if key.partition("/")[2] != "val/var_explained":
        return True
    spread = measured(row, "score/std")
    return spread is None or spread >= _TELLING_SPREAD * largest_spread


_TELLING_SPREAD = 0.1  # of the largest so far: a hundredth of its variance


METRICS: Mapping[str, Metric] = MappingProxyType({metric.key: metric for metric in _ROWS})
"""Metrics by key. Statistics of an algorithm have PPO's prefix here; see `catalogued`."""

# Keys of the offline stages: SFT, reward models, DPO and KTO. An evaluation's begin with "eval_".
_STAGE_ROWS = (
    Metric(
        key="loss",
        title="Loss",
        unit="",
        meaning="What the stage minimises, averaged since the row before. Falls; a rising evaluation loss is "
        "overfitting.",
    ),
    Metric(
        key="accuracy",
        title="Accuracy",
        unit="share",
        meaning="Share of pairs whose chosen response gets the higher reward. 1 in training and far less in evaluation "
        "is overfitting.",
    ),
    Metric(
        key="margin",
        title="Margin",
        unit="",
        meaning="Mean reward of the chosen response minus that of the rejected one. Grows slowly.",
    ),
    Metric(
        key="mean_reward",
        title="Rewards",
        unit="",
        meaning="Mean reward of a batch, between its lowest and highest. Far from 0: set `center_rewards_coefficient`.",
    ),
    Metric(
        key="eval_expected_calibration_error",
        title="Calibration error",
        unit="share",
        meaning="Mean distance between how sure the rewards are and how often they are right, on the evaluation pairs.",
    ),
    Metric(
        key="rewards/accuracies",
        title="Accuracy",
        unit="share",
        meaning="Share of pairs with a positive margin; ties, such as all of the first step, are wrong.",
    ),
    Metric(
        key="rewards/margins",
        title="Margin",
        unit="",
        meaning="Implicit reward of the chosen response minus that of the rejected one. Above 10 it is overfitting.",
    ),
    Metric(
        key="rewards/chosen",
        title="Implicit rewards",
        unit="",
        meaning="β log π/π_ref of the responses. Both falling far below -5: the policy unlearns good responses, too.",
    ),
    Metric(
        key="logps/chosen",
        title="Log-probabilities",
        unit="nats/response",
        meaning="log π of the responses, summed over tokens. That of the chosen ones should not fall by more than a "
        "few tens.",
    ),
    Metric(
        key="kl",
        title="KL estimate",
        unit="nats/response",
        meaning="KTO's baseline: log π/π_ref of responses under other prompts, at least 0.",
    ),
    Metric(
        key="mean_token_accuracy",
        title="Token accuracy",
        unit="share",
        meaning="Share of counted tokens that the model finds most likely.",
    ),
    Metric(
        key="entropy",
        title="Entropy",
        unit="nats/token",
        meaning="Mean entropy of the predictions of counted tokens. Collapsing to 0 is overfitting.",
    ),
    Metric(
        key="grad_norm", title="Gradient norm", unit="", meaning="Norm of the last step's gradient before clipping."
    ),
    Metric(
        key="learning_rate", title="Learning rate", unit="", meaning="The optimizer's learning rate in the last step."
    ),
    Metric(
        key="time/train_tokens_per_second",
        title="Throughput",
        unit="tokens/s",
        meaning="Tokens trained on per second since the row before, including the time of evaluations and saves.",
    ),
)

STAGE_METRICS: Mapping[str, Metric] = MappingProxyType({metric.key: metric for metric in _STAGE_ROWS})
"""Metrics of the offline stages by key. They have no bands: what is healthy depends on the data (docs/dpo.md)."""


def is_offline(config: Mapping[str, Any]) -> bool:
    """Whether a run's settings are those of an offline stage."""
    return bool((config.get("algorithm") or {}).get("offline"))


def catalogued(key: str) -> Metric | None:
    """The entry of a key of `metrics.jsonl`, whose prefix may be that of another algorithm ("grpo/policy/entropy")."""
    if key in METRICS or key in STAGE_METRICS:
        return METRICS.get(key) or STAGE_METRICS[key]
    metric = METRICS.get(f"ppo/{key.partition('/')[2]}")
    return None if metric is None else replace(metric, key=key)


def bands(config: Mapping[str, Any], first_row: Mapping[str, Any] | None = None) -> dict[str, Band]:
    """Healthy bands by key of `metrics.jsonl`, for a run's settings; metrics without a band are absent.

    Args:
        config: contents of `config.resolved.yaml`, such as settings of PPO under "ppo". {} gives the bands that depend
            on no setting.
        first_row: first metrics row of the run, which the entropy's band is relative to.

    Returns:
        Bands under the run's own keys: "grpo/policy/clipfrac" in a run of GRPO.
    """
    if is_offline(config):
        return {}
    name = (config.get("algorithm") or {}).get("name", "ppo")
    result = {
        metric.key: Band(low=metric.low, high=metric.high, reason=metric.reason)
        for metric in METRICS.values()
        if metric.low is not None or metric.high is not None
    }
    settings = config.get("ppo") or {}
    if max_norm := settings.get("max_grad_norm"):
        result["ppo/grad_norm"] = Band(high=10.0 * max_norm, reason=f"ten times max_grad_norm={max_norm:g}")
    if target_kl := settings.get("target_kl"):
        result["ppo/policy/approxkl"] = Band(high=target_kl, reason=f"target_kl={target_kl:g} nats per token")
    if name == "ppo":  # other algorithms do not read these settings
        result |= _bands_of_ppo(settings)
    start = measured(first_row or {}, f"{name}/policy/entropy")
    if start is not None and math.isfinite(start) and start > 0:
        result["ppo/policy/entropy"] = Band(
            low=0.2 * start, high=2.0 * start, reason=f"a fifth to twice the {start:.2f} nats of the first step"
        )
    return {_with_prefix(key, name): band for key, band in result.items()}


def _bands_of_ppo(settings: Mapping[str, Any]) -> dict[str, Band]:
    result = {}
    target, cliprange = settings.get("target"), settings.get("cliprange")
    if target and settings.get("adap_kl_ctrl"):
        result["objective/kl"] = Band(
            low=METRICS["objective/kl"].low,
            high=2.0 * target,
            reason=f"from -1 (sampling noise) to twice the target of {target:g} nats",
        )
    if cliprange:
        result["ppo/policy/mean_ratio"] = Band(
            low=1 - cliprange,
            high=1 + cliprange,
            reason=f"1, its expectation, give or take cliprange={cliprange:g}",
        )
    return result


def _with_prefix(key: str, name: str) -> str:
    return name + key.removeprefix("ppo") if key.startswith("ppo/") else key
