"""Hypothesis draws the same examples in every run, so that a failure is a change of the code."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "stable", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("stable")
