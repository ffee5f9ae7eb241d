"""The losses that `DPOTrainer` can minimise, by the names of `DPOConfig.loss_type`.

Each is a function of the log-probabilities of both responses under the policy and the reference, made of the pure
functions of `trl.functional.preferences`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from trl.functional.preferences import (
    apo_down_loss,
    apo_zero_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    sigmoid_loss,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogprobs:
    """Log-probabilities of both responses of `B` pairs, each summed over the response's tokens."""

    chosen: Tensor  # [B]
    rejected: Tensor  # [B]
    chosen_tokens: Tensor  # [B] length of the response
    rejected_tokens: Tensor  # [B]
    ref_chosen: Tensor  # [B] under the reference; 0 without one
    ref_rejected: Tensor  # [B]

    @property
    def chosen_ratio(self) -> Tensor:
        """`[B]` log π(y_w) / π_ref(y_w)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """`[B]` log π(y_l) / π_ref(y_l)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """`[B]` difference of the two log ratios."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def margin_per_token(self) -> Tensor:
        """`[B]` difference of the two log ratios, each divided by the length of its response."""
        return self.chosen_ratio / self.chosen_tokens - self.rejected_ratio / self.rejected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Coefficients of the losses."""

    beta: float = 0.1
    smoothing: float = 0.0
    simpo_gamma: float = 0.5


PairLoss: TypeAlias = Callable[[PairLogprobs, PairSettings], Tensor]


def _imitation(pairs: PairLogprobs, settings: PairSettings) -> Tensor:
    """`[B]`, each the mean negative log-probability of the batch's chosen tokens: supervised fine-tuning."""
    return (-pairs.chosen.sum() / pairs.chosen_tokens.sum()).expand(len(pairs.chosen))


def _simpo(pairs: PairLogprobs, settings: PairSettings) -> Tensor:
    margin = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return sigmoid_loss(margin, beta=settings.beta, offset=settings.simpo_gamma)


LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": lambda pairs, s: sigmoid_loss(pairs.margin, beta=s.beta, smoothing=s.smoothing),
    "sigmoid_norm": lambda pairs, s: sigmoid_loss(pairs.margin_per_token, beta=s.beta, smoothing=s.smoothing),
    "robust": lambda pairs, s: robust_loss(pairs.margin, beta=s.beta, smoothing=s.smoothing),
    "hinge": lambda pairs, s: hinge_loss(pairs.margin, beta=s.beta),
    # The paper's experiments divide by the length, as TRL has done since 0.8.
    "ipo": lambda pairs, s: ipo_loss(pairs.margin_per_token, beta=s.beta),
    "apo_zero": lambda pairs, s: apo_zero_loss(pairs.chosen_ratio, pairs.rejected_ratio, beta=s.beta),
    "apo_down": lambda pairs, s: apo_down_loss(pairs.chosen_ratio, pairs.rejected_ratio, beta=s.beta),
    "simpo": _simpo,
    "sft": _imitation,
    "odds_ratio": lambda pairs, s: odds_ratio_loss(
        pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
    ),
}
WITHOUT_REFERENCE = frozenset({"simpo", "sft", "odds_ratio"})
SMOOTHED = frozenset({"sigmoid", "sigmoid_norm", "robust"})  # losses that `label_smoothing` changes
_OF_OTHER_RELEASES = "aot aot_pair aot_unpaired bco_pair discopop exo_pair kto_pair nca_pair sppo_hard".split()


def check_loss_types(names: Sequence[str]) -> None:
    """Checks names of losses.

    Raises:
        ValueError: if a name is unknown, or of a loss of TRL that is not supported here.
    """
    if not names:
        raise ValueError(f"loss_type is empty: expected one or several of {', '.join(LOSSES)}")
    for name in names:
        if name not in LOSSES:
            reason = "is a loss of TRL that is not supported" if name in _OF_OTHER_RELEASES else "is unknown"
            raise ValueError(f"loss_type={name!r} {reason}: expected one or several of {', '.join(LOSSES)}")


def combined(pairs: PairLogprobs, settings: PairSettings, names: Sequence[str], weights: Sequence[float]) -> Tensor:
    """Returns the weighted sum `[B]` of several losses."""
    losses = [weight * LOSSES[name](pairs, settings) for name, weight in zip(names, weights, strict=True)]
    return torch.stack(losses).sum(dim=0)
