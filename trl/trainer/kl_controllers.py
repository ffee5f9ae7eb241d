"""Adaptive and fixed KL penalty coefficients."""

from __future__ import annotations

from typing import Any

from trl.functional import adaptive_kl_coef
from trl.trainer.ppo_config import PPOConfig


class AdaptiveKLController:
    """Adapts the KL coefficient to reach a target KL: Ziegler et al. 2019, section 2.2 (arXiv:1909.08593).

    Args:
        init_kl_coef: initial coefficient.
        target: target KL in nats per sequence.
        horizon: time scale of the adaptation, in samples.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Adapts `value`, given a KL of `current` nats measured over `n_steps` samples (over all processes)."""
        self.value = adaptive_kl_coef(
            self.value, float(current), target=self.target, horizon=self.horizon, episodes=n_steps
        )

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, for checkpoints."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved coefficient."""
        self.value = state["value"]


class FixedKLController:
    """Constant KL coefficient.

    Args:
        kl_coef: the coefficient.
    """

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, for checkpoints."""
        return {"value": float(self.value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved coefficient."""
        self.value = state["value"]


def controller_for(config: PPOConfig) -> AdaptiveKLController | FixedKLController:
    """Builds the KL controller that a configuration selects."""
    initial = float(config.init_kl_coef or 0)
    if not config.adap_kl_ctrl:
        return FixedKLController(initial)
    return AdaptiveKLController(initial, float(config.target or 0), float(config.horizon or 0))
