"""Changes of a configuration after the trainer was made, passed on to the optimizer and the KL controller."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from trl.trainer.kl_controllers import AdaptiveKLController, FixedKLController, controller_for
from trl.trainer.ppo_config import PPOConfig

# Settings that other objects hold once the trainer is made; the rest is read from the configuration at every call.
_PASSED_ON = ("learning_rate", "init_kl_coef", "adap_kl_ctrl", "target", "horizon")
_READ_ONCE = (
    "seed", "log_with", "tracker_kwargs", "tracker_project_name", "project_kwargs", "accelerator_kwargs", "dtype",
    "optimizer_state_dtype", "keep_memory", "gradient_checkpointing", "compile",
)  # fmt: skip

KLController = AdaptiveKLController | FixedKLController


class LiveSettings:
    """Sees which settings were changed since it last looked.

    Args:
        config: as the trainer was made with it.
        rate_is_ours: whether `learning_rate` rules: the optimizer is the trainer's own, without a scheduler.
    """

    def __init__(self, config: PPOConfig, *, rate_is_ours: bool) -> None:
        self._rate_is_ours = rate_is_ours
        self._seen = self._look(config)

    @staticmethod
    def _look(config: PPOConfig) -> dict[str, Any]:
        return {name: copy.copy(getattr(config, name)) for name in (*_PASSED_ON, *_READ_ONCE)}

    def follow(self, config: PPOConfig, optimizer: Any, controller: KLController) -> KLController:
        """Passes changes on, and warns of those that come too late.

        Returns:
            The KL controller to use from now on. A new `init_kl_coef` is its coefficient; where `adap_kl_ctrl` alone has
            changed, the coefficient stays what it had become.
        """
        before, self._seen = self._seen, self._look(config)
        changed = [name for name in self._seen if self._seen[name] != before[name]]
        late = [name for name in changed if name in _READ_ONCE or (name == "learning_rate" and not self._rate_is_ours)]
        if late:
            reason = " (the given optimizer or scheduler rules it)" if "learning_rate" in late else ""
            warnings.warn(
                f"changing {', '.join(late)}{reason} on the configuration after the trainer was made has no effect",
                stacklevel=3,
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
