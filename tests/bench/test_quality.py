"""The arithmetic of the measurements in bench/: when a run is good, what differs, which settings are the demo's."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers import assert_close
from trl.demo.outcome import DemoSettings

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(*positive: float) -> list[dict[str, Any]]:
    return [
        {"step": i, "seconds": 2.0 * i, "samples": 64 * i, "positive": p, "kl": 1.0}
        for i, p in enumerate(positive, start=1)
    ]


def test_good_is_the_first_of_five_batches_in_a_row() -> None:
    reached = load("time_to_quality").reached
    run = rows(0.5, 0.95, 0.89, 0.91, 0.92, 0.93, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95)
    assert reached(run, 0.9, 5)["step"] == 8  # 0.9 is not above 0.9
    assert reached(run, 0.9, 1)["step"] == 2
    assert reached(run[:-1], 0.9, 5) is None


def test_systems_are_compared_where_every_run_got_there() -> None:
    module = load("time_to_quality")
    head = {"trl": "1", "unknown": []}
    fast, slow = [head, *rows(0.5, 0.95, 0.95)], [head | {"unknown": ["temperature"]}, *rows(0.5, 0.5, 0.5, 0.95, 0.95)]
    never = [head, *rows(0.5, 0.6)]
    table = module.summary({"ours": [fast, fast], "slow": [slow, slow], "half": [fast, never]}, 0.9, 2)
    assert [row["seconds"] for row in table] == [4.0, 8.0, 4.0]
    assert [row["times_longer"] for row in table] == [1.0, 2.0, None]
    assert [row["samples_per_second"] for row in table] == [32.0] * 3
    text = module.markdown(table, 0.9, 2)
    assert "| half | 1 of 2 | 4 |" in text and "slow does not know the settings temperature." in text


def test_the_job_takes_the_demos_settings() -> None:
    job, demo = load("quality_job"), DemoSettings()
    assert {
        "learning_rate": demo.learning_rate,
        "batch_size": demo.batch_size,
        "mini_batch_size": demo.batch_size // demo.minibatches,
        "ppo_epochs": demo.epochs,
        "init_kl_coef": demo.kl_coef,
        "target": demo.kl_target,
        "horizon": demo.kl_horizon,
        "vf_coef": demo.vf_coef,
        "cliprange_value": demo.cliprange_value,
        "lam": demo.lam,
        "max_grad_norm": 1.0,
        "temperature": demo.temperature,
    } == job.SETTINGS
    assert (48, demo.score_clip, demo.shared_layers) == (job.NEW_TOKENS, job.SCORE_CLIP, job.SHARED_LAYERS)


def test_gradients_are_compared_by_layer() -> None:
    module = load("precision")
    exact = {
        "pretrained_model.transformer.wte.weight": torch.tensor([1.0, 0.0]).double(),
        "pretrained_model.transformer.h.0.a": torch.tensor([3.0, 4.0]).double(),
        "pretrained_model.transformer.h.10.a": torch.tensor([1.0]).double(),
        "pretrained_model.transformer.ln_f.weight": torch.tensor([1.0]).double(),
        "v_head.summary.weight": torch.tensor([1.0]).double(),
    }
    turned = exact | {"pretrained_model.transformer.h.0.a": torch.tensor([4.0, 3.0]).double()}
    found = module.compared({"float64": exact, "float32": exact, "bfloat16": turned})
    assert [r["parameters"] for r in found] == ["embeddings", "layer 0", "layer 10", "last norm", "value head", "all"]
    assert [r["float32_error"] for r in found] == [0.0] * 6
    assert_close(found[1]["bfloat16_cosine"], 24 / 25)
    assert_close(found[1]["bfloat16_error"], 2**0.5 / 5)
    assert found[-1]["count"] == 7


@pytest.mark.parametrize(("other", "overlaps"), [(0.93, True), (0.99, False)])
def test_means_overlap_within_their_standard_errors(other: float, overlaps: bool) -> None:
    module = load("precision")
    assert_close(module.mean_and_error([1.0, 2.0, 3.0]), [2.0, 1 / 3**0.5])
    found = [
        {"arm": arm, "positive": centre + off, "kl": 10 + off, "seconds": 1.0}
        for arm, centre in zip(module.ARMS, (0.92, other, 0.92), strict=True)
        for off in (-0.02, 0.0, 0.02)
    ]
    text, report = module.learning_markdown(found, 44)
    assert report["passes"]["positive"]["overlaps"] is overlaps and report["passes"]["kl"]["overlaps"] is True
    assert report["passes and moments"]["positive"]["overlaps"] is True and report["runs"] == 3
    assert "| nothing | 0.920 ± 0.012 | 10.0 ± 0.0 | 1 |" in text


def test_updates_that_bfloat16_weights_do_not_see() -> None:
    module = load("precision")
    weights = [torch.tensor([1.0, 0.001]), torch.tensor([[0.02, 0.0]])]
    assert module.lost(weights, 1e-4) == 0.25  # numbers next to 1 are 0.0039 and 0.0078 apart
    assert module.lost(weights, 1e-5) == 0.5
    assert module.lost(weights, 1.0) == 0.0


@pytest.mark.slow
def test_both_measurements_run(tmp_path: Path) -> None:
    for command in (
        ["precision.py", "gradients", "--batch", "4", "--mini", "2", "--new", "8"],
        ["precision.py", "learning", "--seeds", "1", "--steps", "2"],
        ["time_to_quality.py", "--seeds", "1", "--steps", "2", "--in-a-row", "1", "--target", "0.3"],
    ):
        subprocess.run(
            [sys.executable, str(BENCH / command[0]), *command[1:], "--out", str(tmp_path)], check=True, timeout=300
        )
    gradients = json.loads((tmp_path / "gradients-tiny-gpt2-reviews.json").read_text())["rows"][-1]
    assert gradients["bfloat16_cosine"] > 0.99 and gradients["float32_error"] < 1e-4
    assert json.loads((tmp_path / "learning.json").read_text())["runs"] == 1
    assert json.loads((tmp_path / "quality.json").read_text())["table"][0]["reached"] == 1
