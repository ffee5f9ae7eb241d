"""Losses on preferences (Bradley-Terry reward models, DPO and its variants, KTO) and calibration of probabilities.

A DPO loss is a function of the margin m = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l) of the chosen response y_w over
the rejected y_l. Without a reference, the margin is that of the log-probabilities alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def pairwise_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """-log σ(r_chosen − r_rejected − margin) + centring · (r_chosen + r_rejected)².

    The Bradley-Terry likelihood of a preference (Ouyang et al. 2022, arXiv:2203.02155, eq. 1), with a margin (Touvron
    et al. 2023, arXiv:2307.09288, eq. 2) and a pull of the rewards' mean to zero (Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 2).

    Args:
        chosen: `[B]` rewards of the chosen responses.
        rejected: `[B]` rewards of the rejected responses.
        margin: `[B]` how much better the chosen response has to be; None for 0.
        centring: coefficient of the pull to zero.

    Returns:
        `[B]` losses.
    """
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    return -logsigmoid(gap) + centring * (chosen + rejected) ** 2


# DPO -----------------------------------------------------------------------------------------------------------------


def sigmoid_loss(margin: Tensor, *, beta: float, smoothing: float = 0.0, offset: float = 0.0) -> Tensor:
    """-(1 − ε) log σ(β m − γ) − ε log σ(−β m + γ).

    DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with ε > 0 conservative DPO (Mitchell 2023, "A note on DPO with
    noisy preferences", eq. 3); with γ > 0 and length-normalised log-probabilities SimPO (Meng et al. 2024,
    arXiv:2405.14734, eq. 6).

    Args:
        margin: `[B]`.
        beta: β, inverse temperature of the implicit reward.
        smoothing: ε, the probability that a label is wrong, in [0, 0.5).
        offset: γ, the target margin of the rewards.

    Returns:
        `[B]` losses.
    """
    logits = beta * margin - offset
    return -(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def robust_loss(margin: Tensor, *, beta: float, smoothing: float) -> Tensor:
    """(-(1 − ε) log σ(β m) + ε log σ(−β m)) / (1 − 2ε): unbiased under labels flipped with probability ε.

    Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12). Arguments and result as for `sigmoid_loss`.
    """
    logits = beta * margin
    return (-(1 - smoothing) * logsigmoid(logits) + smoothing * logsigmoid(-logits)) / (1 - 2 * smoothing)


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − β m): SLiC (Zhao et al. 2023, arXiv:2305.10425), RSO (Liu et al. 2023, arXiv:2309.06657, eq. 11)."""
    return relu(1 - beta * margin)


def ipo_loss(margin: Tensor, *, beta: float) -> Tensor:
    """(m − 1/(2β))²: IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17, whose τ is β)."""
    return (margin - 1 / (2 * beta)) ** 2


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log σ(log odds(y_w) − log odds(y_l)), odds(y) = p / (1 − p): the preference term of ORPO.

    Hong et al. 2024, arXiv:2403.07691, eq. 4 and 7.

    Args:
        chosen: `[B]` mean log-probability per token of the chosen responses; below 0.
        rejected: `[B]` likewise.

    Returns:
        `[B]` losses.
    """

    def log_odds(logprobs: Tensor) -> Tensor:
        return logprobs - torch.log(-torch.expm1(logprobs))  # log(1 - p), exact where p is near 0 or 1

    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(1 − σ(β r_w)) + σ(β r_l): raises the chosen response and lowers the rejected one, each against the reference.

    APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7).

    Args:
        chosen: `[B]` log π(y_w) / π_ref(y_w).
        rejected: `[B]` log π(y_l) / π_ref(y_l).
        beta: β.

    Returns:
        `[B]` losses.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """σ(β r_w) + 1 − σ(β (r_w − r_l)): lowers both responses, the rejected one further.

    APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8). Arguments and result as for `apo_zero_loss`.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


# KTO -----------------------------------------------------------------------------------------------------------------


def kto_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """λ (1 − σ(± β (log π/π_ref − z))), plus for desirable and minus for undesirable responses.

    KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    Args:
        log_ratios: `[B]` log π(y|x) / π_ref(y|x), summed over the tokens of y.
        desirable: `[B]` bool.
        baseline: scalar z, the KL from the reference, estimated on mismatched prompts and responses; detached and not
            below 0.
        beta: β.
        desirable_weight: λ of desirable responses.
        undesirable_weight: λ of undesirable responses.

    Returns:
        `[B]` losses.
    """
    gain = beta * (log_ratios - baseline.detach().clamp(min=0))
    sign = torch.where(desirable, 1.0, -1.0).to(gain)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain)
    return weight * (1 - torch.sigmoid(sign * gain))


# Calibration ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """A reliability diagram: predictions sorted into bins of equal width."""

    confidence: Tensor  # [bins] mean predicted probability; NaN in an empty bin
    frequency: Tensor  # [bins] share of true labels; NaN in an empty bin
    count: Tensor  # [bins] int64

    @property
    def error(self) -> Tensor:
        """Expected calibration error, a scalar: mean over predictions of |frequency − confidence| of their bin."""
        gaps = (self.frequency - self.confidence).abs().nan_to_num(0.0)
        return (gaps * self.count).sum() / self.count.sum().clamp(min=1)


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 10) -> Reliability:
    """Sorts predictions into bins of equal width (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    Args:
        probabilities: `[N]` predicted probability that the label is True.
        labels: `[N]` bool.
        bins: number of bins over [0, 1].

    Raises:
        ValueError: if a probability is outside [0, 1].
    """
    probabilities = probabilities.detach().double()
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):  # also refuses NaN
        raise ValueError("probabilities must be from 0 to 1")
    index = (probabilities * bins).long().clamp(max=bins - 1)
    count = torch.bincount(index, minlength=bins)
    totals = torch.bincount(index, weights=probabilities, minlength=bins)
    hits = torch.bincount(index, weights=labels.double(), minlength=bins)
    return Reliability(confidence=totals / count, frequency=hits / count, count=count)


def preference_reliability(gaps: Tensor, *, bins: int = 20) -> Reliability:
    """How often the response with the higher reward is the chosen one, by how sure the rewards are of it.

    A gap of d predicts the response with the higher reward with the probability σ(|d|), from 1/2 to 1 (Bradley-Terry),
    so that only the upper half of the bins is filled. A gap of 0 counts as a wrong prediction made with probability
    1/2.

    Args:
        gaps: `[N]` reward of the chosen response minus that of the rejected one.
        bins: number of bins over [0, 1].

    Returns:
        The reliability diagram; its `error` is the expected calibration error.
    """
    return reliability(torch.sigmoid(gaps.double().abs()), gaps > 0, bins=bins)
