"""GRPO: group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300)."""

from __future__ import annotations

from functools import partial

from trl.algorithms.policy_gradient import KLPenalty, PolicyGradient, policy_gradient
from trl.functional import k3
from trl.functional.policy_gradients import clipped_surrogate, group_normalised, per_sequence


def grpo(*, clip_range: float = 0.2, kl_coef: float = 0.04) -> PolicyGradient:
    """GRPO, equation 3: advantages are scores, normalised within the responses to one prompt.

    Args:
        clip_range: ε, clips the ratio to [1 - ε, 1 + ε].
        kl_coef: β, weight of the KL to the reference, estimated by k3 in the loss; 0 needs no reference model.
    """
    return policy_gradient(
        "grpo",
        advantages=group_normalised,
        surrogate=partial(clipped_surrogate, low=clip_range, high=clip_range),
        aggregate=per_sequence,
        kl=KLPenalty(estimator=k3, coef=kl_coef) if kl_coef else None,
    )
