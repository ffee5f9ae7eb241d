"""Propagates changes made to a live `PPOConfig` to the optimizer and the KL controller."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController, controller_for
from trl.trainer.ppo_config import PPOConfig

# Settings that other objects copy when the trainer is built; all others are read from the configuration at every call.
_PASSED_ON = ("learning_rate", "init_kl_coef", "adap_kl_ctrl", "target", "horizon")
_READ_ONCE = (
    "seed", "log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "accelerator_kwargs", "dtype",
    "optimizer_state_dtype", "keep_memory", "gradient_checkpointing",
)  # fmt: skip

KLController = AdaptiveKLController | FixedKLController


class LiveSettings:
    """Detects settings that changed since the last call and propagates them.

    Args:
        config: configuration that the trainer was built with.
        rate_is_ours: whether `config.learning_rate` is in charge, i.e. the trainer made its own optimizer and there is
            no scheduler.
    """

    def __init__(self, config: PPOConfig, *, rate_is_ours: bool) -> None:
        self._rate_is_ours = rate_is_ours
        self._seen = self._look(config)

    @staticmethod
    def _look(config: PPOConfig) -> dict[str, Any]:
        return {name: copy.copy(getattr(config, name)) for name in (*_PASSED_ON, *_READ_ONCE)}

    def follow(self, config: PPOConfig, optimizer: Any, controller: KLController) -> KLController:
        """Applies changed settings, and warns about those that no longer have an effect.

        Returns:
            The KL controller to use. A changed `init_kl_coef` resets the coefficient; if only `adap_kl_ctrl` changed,
            the current coefficient is kept.
        """
        before, self._seen = self._seen, self._look(config)
        changed = [name for name in self._seen if self._seen[name] != before[name]]
        late = [name for name in changed if name in _READ_ONCE or (name == "learning_rate" and not self._rate_is_ours)]
        if late:
            reason = " (the given optimizer or scheduler rules it)" if "learning_rate" in late else ""
            warnings.warn(
                f"changing {', '.join(late)}{reason} on the configuration after the trainer was made has no effect",
                stacklevel=4,
            )
        if "learning_rate" in changed and self._rate_is_ours:
            for group in optimizer.param_groups:
                group["lr"] = float(config.learning_rate or 0)
        if "init_kl_coef" in changed or "adap_kl_ctrl" in changed:
            made = controller_for(config)
            if "init_kl_coef" not in changed:
                made.value = controller.value
            return made
        if isinstance(controller, AdaptiveKLController):
            for name in {"target", "horizon"} & set(changed):
                setattr(controller, name, getattr(config, name))
        return controller
