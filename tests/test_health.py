"""The catalogue of metrics: complete sentences, sane bands, and keys that runs really write."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.managed import fresh, run
from trl.health import METRICS, STAGE_METRICS, Band, bands, catalogued, measured
from trl.trackers import read_metrics


def test_every_bound_says_what_leaving_it_means() -> None:
    for key, metric in (METRICS | STAGE_METRICS).items():
        assert metric.key == key and metric.title and metric.meaning.endswith("."), key
        assert metric.low is None or metric.too_low is not None, f"{key} has a lower bound without a symptom"
        assert metric.high is None or metric.too_high is not None, f"{key} has an upper bound without a symptom"
        assert bool(metric.reason) == (metric.low is not None or metric.high is not None), key
        for symptom in filter(None, (metric.too_low, metric.too_high)):
            assert all(part.endswith(".") for part in symptom), key


def test_runs_write_the_keys_of_the_catalogue(tmp_path: Path) -> None:
    run(fresh(), eval_prompts=["a held out prompt"], run_dir=tmp_path / "run")
    written = set().union(*read_metrics(tmp_path / "run"))
    assert set(METRICS) <= written


def test_bands_follow_the_settings() -> None:
    config = {
        "ppo": {"adap_kl_ctrl": True, "target": 6.0, "cliprange": 0.1, "max_grad_norm": 1.0, "target_kl": 0.05},
        "algorithm": {"name": "ppo"},
    }
    found = bands(config, {"ppo/policy/entropy": 3.0})
    expected = {
        "objective/kl": (-1.0, 12.0),
        "ppo/policy/mean_ratio": (0.9, 1.1),
        "ppo/grad_norm": (None, 10.0),
        "ppo/policy/approxkl": (None, 0.05),
        "ppo/policy/entropy": (0.6, 6.0),
        "ppo/policy/clipfrac": (None, 0.3),
    }
    for key, (low, high) in expected.items():
        assert (found[key].low, found[key].high) == pytest.approx((low, high), nan_ok=True), key
    config["ppo"]["adap_kl_ctrl"] = False
    assert bands(config)["objective/kl"].high is None


def test_other_algorithms_have_keys_of_their_own_and_no_bands_of_ppo_settings() -> None:
    found = bands({"ppo": {"adap_kl_ctrl": True, "target": 6.0, "cliprange": 0.1}, "algorithm": {"name": "grpo"}})
    assert found["grpo/policy/clipfrac"].high == 0.3 and not any(key.startswith("ppo/") for key in found)
    assert found["objective/kl"].high is None and found["grpo/policy/mean_ratio"].high == 1.25
    metric = catalogued("grpo/policy/clipfrac")
    assert metric is not None and metric.key == "grpo/policy/clipfrac" and metric.title == "Clip fraction"
    assert catalogued("nothing/at/all") is None


def test_offline_stages_have_keys_of_their_own_and_no_bands() -> None:
    assert bands({"algorithm": {"name": "dpo", "offline": True}}) == {}
    assert not set(STAGE_METRICS) & set(METRICS)
    metric = catalogued("rewards/margins")
    assert metric is not None and metric.title == "Margin"


def test_no_band_holds_a_number_that_is_not_finite() -> None:
    assert Band(low=0.0, high=1.0).holds(0.5) and Band(low=0.0).holds(0.0)
    assert not Band(high=1.0).holds(1.5) and not Band(low=0.0).holds(-0.5)
    assert not Band().holds(math.nan) and not Band().holds(math.inf)


def test_a_number_that_is_not_finite_is_told_from_one_that_is_missing() -> None:
    row = {"step": 3, "a": 1, "b": None, "c": math.inf, "d": None, "score/mean": math.nan, "e": "x", "nonfinite": ["d"]}
    found = {key: measured(row, key) for key in ("a", "b", "c", "d", "score/mean", "e", "f")}
    assert found.pop("a") == 1.0
    assert math.isnan(found.pop("c") or 0) and math.isnan(found.pop("d") or 0)
    assert found == dict.fromkeys(("b", "score/mean", "e", "f"))
    for start in (math.nan, math.inf, 0.0):
        assert bands({}, {"ppo/policy/entropy": start})["ppo/policy/entropy"] == bands({})["ppo/policy/entropy"]


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, trl.health; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
