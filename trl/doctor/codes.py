"""Catalogue of what the doctor can find. docs/doctor.md has a section for each code."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from trl.health import METRICS, NOT_FINITE, Symptom
from trl.trackers.findings import Finding


class Code(NamedTuple):
    """A failure that the doctor knows."""

    title: str
    remedy: str
    severity: Literal["warning", "error"] = "warning"
    """"error": the run cannot train correctly."""


def _of(symptom: Symptom | None) -> Code:
    """The code of a metric outside of its healthy band."""
    assert symptom is not None
    return Code(symptom.symptom, f"{symptom.cause} {symptom.change}")


CODES: Mapping[str, Code] = MappingProxyType(
    {
        # Settings and models, before anything is sampled.
        "not-causal": Code(
            "The model is no causal language model: its predictions read the tokens that they predict.",
            "Load a causal model, or this one with is_decoder=True.",
            "error",
        ),
        "reference-is-policy": Code(
            "The reference model is the policy itself: it is trained along, so the KL stays at 0 and penalises "
            "nothing.",
            "Leave ref_model out, or pass create_reference_model(model).",
            "error",
        ),
        "learning-rate": Code(
            "The learning rate is too high for a model of this size.",
            "Lower learning_rate: 1e-5 is usual for full fine-tuning of 100 million parameters and more, 1e-4 for an "
            "adapter.",
        ),
        "temperature-mismatch": Code(
            "Responses are sampled at another temperature than the update scores them at.",
            "Set PPOConfig.temperature, which sampling and update both use, and leave temperature out of generation.",
        ),
        "sampling-reshaped": Code(
            "Responses are sampled from a reshaped distribution, of which the update knows nothing.",
            "Remove these settings from generation or from the model's generation config. "
            "To discourage short responses, use missing_eos_penalty or the reward.",
        ),
        "stop-token-unreachable": Code(
            "No stop token is in the model's vocabulary: a response can only end at its limit of tokens.",
            "Use the tokenizer that belongs to the model, or set stop_token_ids.",
        ),
        "prompt-ends-with-stop": Code(
            "Prompts end with a stop token: the model is asked to go on after the end of a text.",
            "Keep the tokenizer from adding eos to prompts (add_eos_token=False), or remove it from them.",
        ),
        # The first batch, before its update.
        "dropout-on": Code(
            "Dropout is on in the policy: the update computes other log-probabilities than the ones that it compares "
            "with.",
            "Call model.eval() before training, or set the dropout of model and adapter to 0.",
        ),
        "sampler-mismatch": Code(
            "The responses do not look like samples of the policy: its entropy and their log-probabilities disagree.",
            "Likely causes: sampling settings or processors that the update does not see, left padding without "
            "attention mask or positions in a generate of your own, greedy decoding, or responses from another model. "
            "Sample with trainer.generate; for responses from elsewhere, give step their sampler_logprobs.",
        ),
        "sampler-gap": Code(
            "Sampler and trainer compute different log-probabilities for the same tokens.",
            "Sample and score with the same weights, dtype and adapter; log-probabilities that another engine computed "
            "belong in sampler_logprobs, so that the update can weight by them.",
        ),
        "dtype-mismatch": Code(
            "Sampler and trainer compute in different precisions.",
            "Set PPOConfig.dtype='float32', or remove the overridden loss, train_minibatch or batched_forward_pass, "
            "which compute with the weights as stored.",
        ),
        "padding-changes-logprobs": Code(
            "A response has other log-probabilities in a padded batch than alone.",
            "Left padding needs position_ids that count from the first token. Remove your batched_forward_pass, or let "
            "it call the trainer's own, which pads correctly on either side.",
        ),
        "reference-differs": Code(
            "Before the first update, the policy is already far from the reference.",
            "Pass the model that the policy starts from as ref_model, or leave it out.",
        ),
        "value-head-scale": Code(
            "The value head predicts far larger numbers than the rewards can add up to.",
            "Use a fresh value head (v_head_init_strategy=None), scale the scores (use_score_scaling), lower the "
            "learning rate, or set max_grad_norm.",
        ),
        "constant-reward": _of(METRICS["score/std"].too_low),
        "constant-groups": Code(
            "In every group, all responses to a prompt got the same score: their advantages are 0.",
            "Use prompts that are neither too hard nor too easy, a reward that tells responses apart, a larger "
            "group_size, or a higher temperature.",
        ),
        # Metrics of a run.
        "not-finite": _of(NOT_FINITE),
        "truncated": _of(METRICS["tokens/truncated"].too_high),
        "kl-above-target": _of(METRICS["objective/kl"].too_high),
        "kl-negative": _of(METRICS["objective/kl"].too_low),
        "policy-collapse": Code(
            "The policy has collapsed: it has left the reference by more than any text can explain.",
            "The learning rate is too high, or the reward is exploited. Start again from the last good checkpoint with "
            "a lower learning_rate and max_grad_norm=1.0; on_spike='rollback' does so by itself.",
        ),
        "clip-fraction": _of(METRICS["ppo/policy/clipfrac"].too_high),
        "entropy-collapse": _of(METRICS["ppo/policy/entropy"].too_low),
        "entropy-explosion": _of(METRICS["ppo/policy/entropy"].too_high),
        "explained-variance": _of(METRICS["ppo/val/var_explained"].too_low),
        "samples-excluded": _of(METRICS["reward/excluded"].too_high),
    }
)


def finding(code: str, evidence: str, *, step: int = 0, severity: Literal["warning", "error"] | None = None) -> Finding:
    """A finding of this code.

    Args:
        code: a key of `CODES`.
        evidence: the numbers that it was concluded from, without a full stop.
        step: steps done.
        severity: if it depends on the numbers.
    """
    known = CODES[code]
    return Finding(
        step=step,
        code=code,
        severity=severity or known.severity,
        title=known.title,
        evidence=evidence,
        remedy=known.remedy,
    )
