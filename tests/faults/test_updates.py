"""Losses that are no numbers, spikes, and memory that runs out, in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.harness import KILLED, Server, differences
from tests.faults.orders import FULL, Undisturbed, at, checkpoints, losses
from tests.helpers import assert_close
from trl.state.checkpoints import load_checkpoint

# Four losses in each step: the ninth is the first of step 3.
STEP_3, STEP_4 = 9, 13


def final_weights(folder: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(folder / "run" / "checkpoints")
    assert checkpoint is not None
    return checkpoint.tensors("policy")


def test_a_loss_that_is_not_finite_is_skipped_and_kept(
    server: Server, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    ended = server.run(tmp_path, {**FULL, "orders": [losses("nan", STEP_3, STEP_3 + 1)]})
    assert ended.status == 0, ended.log[-3000:]
    wanted = undisturbed(FULL)
    assert [row["ppo/skipped_updates"] for row in ended.report["rows"]] == [0, 0, 0.5, 0, 0, 0]
    assert ended.report["rows"][:2] == wanted["rows"][:2]
    assert ended.report["bits"]["weights"] != wanted["bits"]["weights"]
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())
    dumps = sorted((tmp_path / "run" / "dumps").iterdir())
    assert [path.name[:13] for path in dumps] == ["step-00000003"] * 2
    dumped = load_file(dumps[0])
    assert dumped["advantages"].shape == dumped["mask"].shape and len(dumped["tokens"]) == 2


def test_too_many_losses_that_are_not_finite_end_the_run(server: Server, tmp_path: Path) -> None:
    ended = server.run(tmp_path, {**FULL, "orders": [losses("nan", STEP_3, STEP_3 + 10)]})
    assert ended.status == 1
    assert "NonFiniteError: 3 optimizer steps in a row were skipped" in ended.log
    assert ended.report == {}
    assert checkpoints(tmp_path) == ["step-00000002"]  # nothing of the step that failed


def test_memory_that_runs_out_changes_the_microbatch_alone(server: Server, tmp_path: Path) -> None:
    # Dropout draws by the microbatch; and Adam makes a large step of a tiny gradient, whatever its sign. The step in
    # which it happens is the last: what is sampled after it may turn on the last bit of a probability.
    job = {"case": "plain sgd", "dropout": False, "steps": 4}
    plain = server.run(tmp_path / "plain", job)
    ended = server.run(tmp_path / "short", {**job, "orders": [losses("memory", STEP_4, STEP_4)]})
    assert plain.status == ended.status == 0, ended.log[-3000:]
    assert "out of memory with a microbatch of 2: reducing it to 1" in ended.log
    wanted = final_weights(tmp_path / "plain")
    for name, tensor in final_weights(tmp_path / "short").items():
        assert_close(tensor, wanted[name], tol=1e-6)
    counted = ended.report["counts"]["before step"]
    assert counted == plain.report["counts"]["before step"] == 16
    assert ended.report["counts"]["before backward"] == 3 * 4 + 8


# Spikes. The tiny model's KL is below 1 nat; weights that were shaken have more than ten.
BOUND = {"kl_above": 5.0}
SHAKEN = at("after step", 3 * 4, "shake")  # the last update of step 3: step 4 sees it


def spiked(policy: str) -> dict[str, Any]:
    return {**FULL, "train": {"on_spike": policy}, "spike": BOUND}


def kls(report: dict[str, Any]) -> list[bool]:
    """Of each step, whether its KL is above the bound."""
    return [row["objective/kl"] > BOUND["kl_above"] for row in report["rows"]]


@pytest.mark.slow
def test_a_spike_is_told(server: Server, tmp_path: Path) -> None:
    ended = server.run(tmp_path, {**spiked("warn"), "orders": [SHAKEN]})
    assert ended.status == 0, ended.log[-3000:]
    assert kls(ended.report)[:4] == [False, False, False, True]
    assert ended.report["counts"]["before step"] == 24
    assert "spike in step 4: the kl is" in (tmp_path / "run" / "events.log").read_text()


def test_batches_that_spike_are_not_learnt_from(server: Server, tmp_path: Path) -> None:
    ended = server.run(tmp_path, {**spiked("skip"), "orders": [SHAKEN]})
    assert ended.status == 0, ended.log[-3000:]
    assert kls(ended.report) == [False, False, False, True, True, True]
    assert [row["run/skipped_batches"] for row in ended.report["rows"]] == [0, 0, 0, 1, 2, 3]
    assert ended.report["counts"]["before step"] == 12  # three steps were skipped whole
    four = server.run(tmp_path, {**spiked("skip"), "steps": 8})
    assert four.status == 1
    assert "SpikeError: 4 batches in a row spiked" in four.log


def test_a_run_goes_back_to_before_the_spike(server: Server, tmp_path: Path) -> None:
    job = spiked("rollback")
    wanted = server.run(tmp_path / "whole", {**job, "orders": [SHAKEN]})
    assert wanted.status == 0, wanted.log[-3000:]
    assert kls(wanted.report) == [False, False, False, True, False, False]
    assert wanted.report["rows"][-1]["run/rollbacks"] == 1
    assert wanted.report["counts"]["before step"] == 20
    assert "rolled back to step 2" in (tmp_path / "whole" / "run" / "events.log").read_text()
    folder = tmp_path / "killed"
    ended = server.run(folder, {**job, "orders": [SHAKEN, at("scoring", 4 * 4 + 2)]})
    assert ended.status == KILLED
    ended = server.run(folder, job)
    assert not differences(ended.report, wanted.report)
