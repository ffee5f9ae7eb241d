"""Rewards that fail inside a run do what `on_error` says, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import KILLED, Server, differences
from tests.faults.orders import at

BAD = "0"  # the prompt on which they misbehave
WORDS = {
    "raises": "ZeroDivisionError: no score to be had",
    "hangs": "TimeoutError",
    "crashes": "was killed by SIGSEGV",
    "exits": "exit",
    "wrong_length": "2",
}


def job(reward: str, **guard: Any) -> dict[str, Any]:
    whole = {"isolation": "process", "timeout": 1.0, "rows_per_call": 1, **guard}
    return {"case": "lora", "reward": reward, "guard": whole}


def split(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples of the prompt on which rewards fail, and the others."""
    samples = [sample for some in report["samples"] for sample in some]
    return [s for s in samples if s["prompt_id"] == BAD], [s for s in samples if s["prompt_id"] != BAD]


def without_errors(report: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how the reward failed."""
    samples = [[{**sample, "error": sample["error"] is not None} for sample in some] for some in report["samples"]]
    return {**report, "samples": samples}


@pytest.mark.parametrize(
    "kinds", [("raises", "crashes"), pytest.param(tuple(WORDS), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_sample_without_a_score_is_left_out(server: Server, tmp_path: Path, kinds: Sequence[str]) -> None:
    reports = {}
    for kind in kinds:
        ended = server.run(tmp_path / kind, job(kind, on_error="skip"))
        assert ended.status == 0, ended.log[-3000:]
        reports[kind] = without_errors(ended.report)
        bad, good = split(ended.report)
        assert len(bad) >= 2
        assert all(sample["score"] is None and WORDS[kind] in sample["error"] for sample in bad), bad
        assert all(sample["score"] is not None and sample["error"] is None for sample in good)
    # Whether it raised, hung or crashed: the same samples are left out, and nothing else is different.
    first, *others = reports.values()
    for other in others:
        assert not differences(other, first)


@pytest.mark.slow
def test_a_failed_sample_is_not_one_with_a_score_of_zero(server: Server, tmp_path: Path) -> None:
    skipped = server.run(tmp_path / "skip", job("raises", on_error="skip")).report
    zero = server.run(tmp_path / "zero", job("raises", on_error="penalty", penalty=0.0)).report
    assert skipped["bits"]["weights"] != zero["bits"]["weights"]


@pytest.mark.slow
def test_a_penalty_is_the_score(server: Server, tmp_path: Path) -> None:
    ended = server.run(tmp_path, job("raises", on_error="penalty", penalty=-3.0))
    assert ended.status == 0, ended.log[-3000:]
    bad, good = split(ended.report)
    assert all(sample["score"] == -3.0 and WORDS["raises"] in sample["error"] for sample in bad)
    assert all(sample["score"] >= 0 for sample in good)


@pytest.mark.parametrize(
    "kind", ["raises", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hangs", "crashes", "exits"))]
)
def test_a_reward_that_must_not_fail_ends_the_run(server: Server, tmp_path: Path, kind: str) -> None:
    ended = server.run(tmp_path, job(kind, on_error="raise"))
    assert ended.status == 1
    assert "RewardFailed" in ended.log and WORDS[kind] in ended.log
    assert not ended.report


@pytest.mark.slow
def test_too_many_errors_end_the_run_with_the_commonest(server: Server, tmp_path: Path) -> None:
    # The prompt comes up once in ten samples, the third time in step 6 or later: one time too many, also for a run that was
    # killed in between.
    limited = {**job("raises", on_error="skip"), "budget": {"share": 0.02, "window": 100}, "steps": 8}
    ended = server.run(tmp_path / "killed", {**limited, "orders": [at("after step", 4 * 4 + 1)]})
    assert ended.status == KILLED
    for name in ("whole", "killed"):
        ended = server.run(tmp_path / name, limited)
        assert ended.status == 1
        assert "RewardErrors: the reward failed on 3 of the last" in ended.log
        assert WORDS["raises"] in ended.log and 'rewards.py", line' in ended.log
        assert not ended.report
