"""Losses that are no numbers, spikes, and memory that runs out, in the middle of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.faults.harness import Server
from tests.faults.orders import FULL, Undisturbed, checkpoints, losses
from tests.helpers import assert_close
from trl.training.checkpoints import load_checkpoint

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
    assert "out of memory with a microbatch of 2: from now on it is 1" in ended.log
    wanted = final_weights(tmp_path / "plain")
    for name, tensor in final_weights(tmp_path / "short").items():
        assert_close(tensor, wanted[name], tol=1e-6)
    counted = ended.report["counts"]["before step"]
    assert counted == plain.report["counts"]["before step"] == 16
    assert ended.report["counts"]["before backward"] == 3 * 4 + 8
