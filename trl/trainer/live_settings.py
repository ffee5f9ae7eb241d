"""Propagates changes made to a live `PPOConfig` to the optimizer and the KL controller."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController, controller_for
from trl.trainer.ppo_config import PPOConfig

# Settings that other objects copy when the trainer is built; all others are read from the configuration at every call.
_COPIED = ("learning_rate", "init_kl_coef", "adap_kl_ctrl", "target", "horizon")
_READ_ONCE = (
    "seed", "log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "accelerator_kwargs", "dtype",
    "optimizer_state_dtype", "keep_memory", "gradient_checkpointing",
)  # fmt: skip

KLController = AdaptiveKLController | FixedKLController


class LiveSettings:
    """Detects settings that changed since the last call and propagates them.

    Args:
        config: configuration that the trainer was built with.
        controls_rate: whether `config.learning_rate` sets the learning rate, i.e. the trainer created the optimizer and
            there is no scheduler.
    """

    def __init__(self, config: PPOConfig, *, controls_rate: bool) -> None:
        self._controls_rate = controls_rate
        self._last = self._copy(config)

    @staticmethod
    def _copy(config: PPOConfig) -> dict[str, Any]:
        values = {name: getattr(config, name) for name in (*_COPIED, *_READ_ONCE)}
        # Trackers in log_with are compared by identity, so they are not copied.
        return {name: copy.copy(value) if isinstance(value, list | dict) else value for name, value in values.items()}

    def follow(self, config: PPOConfig, optimizer: Any, controller: KLController) -> KLController:
        """Applies changed settings, and warns about those that no longer have an effect.

        Returns:
            The KL controller to use. A changed `init_kl_coef` resets the coefficient; if only `adap_kl_ctrl` changed,
            the current coefficient is kept.
        """
        before, self._last = self._last, self._copy(config)
        changed = [name for name in self._last if self._last[name] != before[name]]
        ignored = [
            name for name in changed if name in _READ_ONCE or (name == "learning_rate" and not self._controls_rate)
        ]
        if ignored:
            reason = " (set by the given optimizer or scheduler)" if "learning_rate" in ignored else ""
            warnings.warn(
                f"changing {', '.join(ignored)}{reason} on the configuration after the trainer was built has no effect",
                stacklevel=4,
            )
        if "learning_rate" in changed and self._controls_rate:
            for group in optimizer.param_groups:
                group["lr"] = float(config.learning_rate or 0)
        if "init_kl_coef" in changed or "adap_kl_ctrl" in changed:
            new_controller = controller_for(config)
            if "init_kl_coef" not in changed:
                new_controller.value = controller.value
            return new_controller
        if isinstance(controller, AdaptiveKLController):
            for name in {"target", "horizon"} & set(changed):
                setattr(controller, name, getattr(config, name))
        return controller
