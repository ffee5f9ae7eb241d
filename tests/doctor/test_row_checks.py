"""Rows of metrics that a doctor should know, and rows that it should leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from trl.doctor import CODES
from trl.doctor.row_checks import RowChecks

CONFIG = {"ppo": {"target": 6.0, "adap_kl_ctrl": True, "cliprange": 0.2}}
HEALTHY = {
    "score/mean": 0.5, "score/std": 0.3, "score/p05": 0.0, "score/p95": 1.0, "objective/kl": 4.0, "objective/kl_coef": 0.2,
    "ppo/policy/entropy": 3.0, "ppo/policy/clipfrac": 0.1, "ppo/val/var_explained": 0.3, "ppo/val/mean": 0.4,
    "ppo/val/var": 0.1, "tokens/responses_len_mean": 48.0, "tokens/truncated": 0.3, "reward/excluded": 0.0,
}  # fmt: skip


def found(rows: Iterable[Mapping[str, Any]], config: Mapping[str, Any] = CONFIG, **arguments: Any) -> dict[str, int]:
    """Steps of the findings by code, for changes to healthy rows."""
    checks = RowChecks(config, **arguments)
    rows = [{"step": i, "run/episodes": 16 * i, **HEALTHY, **changes} for i, changes in enumerate(rows, start=1)]
    return {finding.code: finding.step for row in rows for finding in checks.see(row)}


def test_a_healthy_run_is_left_alone() -> None:
    assert found([{}] * 60) == {}
    assert found([{}] * 60, {}) == {}


@pytest.mark.parametrize(
    ("key", "value", "code", "step"),
    [  # outside from step 31 on; the rules say how many rows in a row it takes
        ("objective/kl", 19.0, "kl-above-target", 40),
        ("objective/kl", -1.5, "kl-negative", 35),
        ("objective/kl", 49.0, "policy-collapse", 32),
        ("ppo/policy/clipfrac", 0.31, "clip-fraction", 35),
        ("ppo/policy/entropy", 0.5, "entropy-collapse", 35),
        ("ppo/policy/entropy", 6.5, "entropy-explosion", 33),
        ("ppo/val/var_explained", -0.6, "explained-variance", 50),
        ("ppo/val/mean", 30.0, "value-head-scale", 33),
        ("reward/excluded", 0.2, "samples-excluded", 35),
        ("tokens/truncated", 1.0, "truncated", 33),
    ],
)
def test_what_leaves_its_band_and_stays_out_is_found_once(key: str, value: float, code: str, step: int) -> None:
    assert code in CODES
    result = found([{}] * 30 + [{key: value}] * 40)
    assert result[code] == step
    assert set(result) <= {code, "kl-above-target"}  # a collapse is above the target as well
    once_back = ([{key: value}] * (step - 31) + [{}]) * 4
    assert code not in found([{}] * 30 + once_back)


def test_evidence_has_the_numbers_and_the_steps() -> None:
    checks = RowChecks(CONFIG)
    rows = [{"step": i, **HEALTHY, "ppo/policy/clipfrac": 0.45} for i in range(1, 6)]
    (finding,) = [finding for row in rows for finding in checks.see(row)]
    assert finding.evidence == "ppo/policy/clipfrac = 0.45; healthy is at most 0.3 (in steps 1 to 5)"
    assert (finding.step, finding.severity, finding.page) == (5, "warning", "docs/doctor.md#clip-fraction")


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo/policy/entropy": 0.01, "tokens/responses_len_mean": 2.0},  # sharp, in short responses
        {"objective/kl": 11.0, "tokens/responses_len_mean": 2.0},  # a sure choice of one among many words
        {"ppo/val/var_explained": -0.4},
        {"tokens/truncated": 0.9},
        {"objective/kl": None, "ppo/policy/entropy": None},
        {"score/mean": float("nan"), "score/std": float("nan"), "ppo/val/var": float("inf")},  # no sample has a score
    ],
)
def test_no_false_alarm(changes: dict[str, Any]) -> None:
    assert found([{}] * 5 + [changes] * 60) == {}


@pytest.mark.parametrize("of_a_file", [False, True])
def test_a_metric_that_is_not_finite_is_outside_of_any_band(of_a_file: bool) -> None:
    keys = ["objective/kl", "ppo/policy/entropy", "ppo/loss/value", "ppo/grad_norm"]
    lost: dict[str, Any] = dict.fromkeys(keys, None if of_a_file else float("nan"))
    if of_a_file:
        lost["nonfinite"] = keys
    assert found([{}] * 30 + [lost] * 9) == {"not-finite": 33}
    assert found([lost] * 9) == {"not-finite": 3}  # from the first step on
    assert found([{}, lost, lost] * 9) == {}  # float16, looking for its loss scale
    checks = RowChecks(CONFIG)
    (finding,) = [f for i in range(1, 6) for f in checks.see({"step": i, **HEALTHY, **lost})]
    names = "objective/kl, ppo/policy/entropy, ppo/loss/value and 1 more"
    assert finding.evidence == f"Not finite: {names} (in steps 1 to 3)"


def test_a_negative_explained_variance_is_usual_at_first() -> None:
    assert found([{"ppo/val/var_explained": -3.0}] * 39 + [{}] * 9) == {}
    assert found([{"ppo/val/var_explained": -3.0}] * 40) == {"explained-variance": 40}


def test_explained_variance_is_judged_where_scores_vary() -> None:
    """A run of two tokens, solved in step 16: scores of 2, returns of variance 0.0019, values that miss them by 0.15."""
    solved = {"score/mean": 2.0, "score/std": 0.0, "ppo/val/var_explained": -11.0}
    assert found([{}] * 15 + [solved] * 100) == {}
    assert found([{}] * 15 + [solved | {"score/std": 0.02}] * 100) == {}  # one sample of many differs
    varied = solved | {"score/std": 0.04}  # over a tenth of the largest so far, 0.3
    assert found([{}] * 15 + [varied] * 100) == {"explained-variance": 40}
    assert found([{}] * 15 + [solved | {"score/std": None}] * 100) == {"explained-variance": 40}


def test_a_constant_reward_is_one_that_never_varied() -> None:
    constant = {"score/std": 0.0, "score/mean": 1.0}
    assert found([constant] * 9) == {"constant-reward": 3}
    assert found([{}, *[constant] * 9]) == {}  # solved
    assert found([constant, {"score/std": 0.0, "score/mean": 0.0}, *[constant] * 9]) == {}  # one prompt a batch
    few = [constant | {"run/episodes": 4 * step} for step in range(1, 10)]
    assert found(few) == {"constant-reward": 8}  # 32 samples
    large = [{"score/std": 1e-5, "score/mean": 1e4, "score/p05": 1e4, "score/p95": 1e4}] * 9
    assert found(large) == {"constant-reward": 3}


def test_cut_responses_are_told_of_where_ends_are_meant() -> None:
    cut = [{"tokens/truncated": 1.0}] * 9
    assert found(cut) == {}  # free continuations, as in the demo
    assert found(cut, expects_end=True) == {"truncated": 3}
    assert found(cut, {"ppo": {"missing_eos_penalty": 1.0}}) == {"truncated": 3}
    assert found(cut, {"ppo": {"stop_token_ids": [1]}}) == {"truncated": 3}


def test_other_algorithms_have_their_own_keys() -> None:
    rows = [{"grpo/policy/clipfrac": 0.5, "ppo/policy/clipfrac": None}] * 9
    assert found(rows, {"algorithm": {"name": "grpo"}}) == {"clip-fraction": 5}


def test_skipped_steps_have_no_statistics() -> None:
    """A batch without a score: the row has neither KL nor entropy, and breaks no streak of its own."""
    empty = dict.fromkeys(HEALTHY)
    assert found([empty, {}, *[{}] * 20]) == {}
