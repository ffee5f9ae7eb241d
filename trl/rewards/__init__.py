"""Reward sources (functions, classifiers, penalties, remote services, LLM judges) and their failure handling.

Names load lazily on first use: a worker process that runs a plain function imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "trl.rewards.adapter": ("AdapterReward",),
    "trl.rewards.cache": ("CachedReward", "ScoreCache"),
    "trl.rewards.classifier": ("ClassifierReward",),
    "trl.rewards.compose": ("RewardMix", "as_reward"),
    "trl.rewards.failures": ("ErrorBudget", "RewardErrors", "RewardFailed"),
    "trl.rewards.function": ("FunctionReward", "Guard"),
    "trl.rewards.judge": ("JudgeReward",),
    "trl.rewards.maths": ("math_reward",),
    "trl.rewards.parts": ("FormatReward", "LengthPenalty"),
    "trl.rewards.remote": ("RemoteReward",),
    "trl.rewards.steps": ("StepReward",),
    "trl.rewards.unit_tests": ("UnitTestReward",),
    "trl.types": ("Sample", "Scored"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterReward",
    "CachedReward",
    "ClassifierReward",
    "ErrorBudget",
    "FormatReward",
    "FunctionReward",
    "Guard",
    "JudgeReward",
    "LengthPenalty",
    "RemoteReward",
    "RewardErrors",
    "RewardFailed",
    "RewardMix",
    "Sample",
    "ScoreCache",
    "Scored",
    "StepReward",
    "UnitTestReward",
    "as_reward",
    "math_reward",
]

if TYPE_CHECKING:
    from trl.rewards.adapter import AdapterReward
    from trl.rewards.cache import CachedReward, ScoreCache
    from trl.rewards.classifier import ClassifierReward
    from trl.rewards.compose import RewardMix, as_reward
    from trl.rewards.failures import ErrorBudget, RewardErrors, RewardFailed
    from trl.rewards.function import FunctionReward, Guard
    from trl.rewards.judge import JudgeReward
    from trl.rewards.maths import math_reward
    from trl.rewards.parts import FormatReward, LengthPenalty
    from trl.rewards.remote import RemoteReward
    from trl.rewards.steps import StepReward
    from trl.rewards.unit_tests import UnitTestReward
    from trl.types import Sample, Scored


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
        globals()[name] = value  # later accesses bypass __getattr__
        return value
    raise AttributeError(f"module 'trl.rewards' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
