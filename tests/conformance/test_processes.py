"""Several processes that were started together: lines 46, 47, 49 and 53 of the list of what PPO codebases have got wrong.

One start serves all tests but the slow ones; the numbers to be met are those of one process with all samples.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import ranks_together
from tests.helpers import assert_close
from tests.programs import run_program

pytestmark = pytest.mark.conformance
ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "tests" / "conformance" / "ranks_together.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user on a machine without a GPU would, with nothing else in the environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return run_program([sys.executable, "-m", *launcher, SCRIPT], cwd=ROOT, env=kept | environment)


def reports(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda report: report["rank"])


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two processes did that torchrun started."""
    return reports(start(*TORCHRUN))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process does with the samples of both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ranks_together.report(0, 1)


def assert_same(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert name in outcome, name
        try:
            assert_close(outcome[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {outcome[name]} instead of {value}") from error


def test_53_torchrun_trains_one_model_without_a_gpu(ranks: Any, alone: Any) -> None:
    assert [report["world"] for report in ranks] == [2, 2]
    assert ranks[0]["three steps"] == ranks[1]["three steps"]
    names = ("norms", "gradients", "ppo/grad_norm", "ppo/loss/total", "objective/kl")
    assert_same(ranks[0]["three steps"], {name: alone["three steps"][name] for name in names})


def test_53_processes_draw_different_responses_from_one_seed(ranks: Any) -> None:
    for path in ("own draws", "transformers' draws"):
        first, second = ranks[0][path], ranks[1][path]
        drawn = {tuple(response) for response in first + second}
        assert len(drawn) == 4, path


@pytest.mark.parametrize("kind", ["OwnLoss", "OwnMinibatch"])
def test_46_an_overridden_method_learns_on_two_processes_what_the_trainer_learns_on_one(
    kind: str, ranks: Any, alone: Any
) -> None:
    names = ("norms", "gradients", "ppo/grad_norm", "ppo/loss/total", "ppo/policy/policykl", "ppo/val/var_explained")
    expected = {name: alone["PPOTrainer"][name] for name in names}
    assert_same(alone[kind], expected)
    for report in ranks:
        assert_same(report[kind], expected)


@pytest.mark.parametrize(
    "case",
    [
        "OtherLoss", "OtherLoss, half left out", "PPOTrainer, half left out", "PPOTrainer, some refused", "OwnLoss, some refused",
    ],
)  # fmt: skip
def test_46_a_loss_of_ones_own_learns_the_same_on_two_processes(case: str, ranks: Any, alone: Any) -> None:
    """A mean over a process's tokens weighs as its tokens do, and nothing where there are none."""
    for report in ranks:
        assert_same(report[case], alone[case])


def test_46_an_overridden_method_hears_the_denominator_and_the_sampler(ranks: Any, alone: Any) -> None:
    """On one process and on two; minibatches are other ones on two, so that these are not compared with one."""
    for report in (alone, *ranks):
        assert_same(report["OwnMinibatch, all settings"], report["PPOTrainer, all settings"])


def test_47_a_step_is_a_step_on_any_number_of_processes(ranks: Any, alone: Any) -> None:
    for report in ranks:
        outcome = report["three steps"]
        assert (outcome["scheduled"], outcome["steps"]) == (3, 3)
        assert_close(outcome["rate"], 0.1 * (1 - 3 / 10))
        assert_close(outcome["ppo/learning_rate"], 0.1 * (1 - 2 / 10))
        assert outcome["moments"][2] == 3 * 8
        assert_same(outcome, {name: alone["three steps"][name] for name in ("kl_coef", "moments", "objective/kl_coef")})


@pytest.mark.parametrize("case", ["three steps", "OwnLoss", "OtherLoss", "OwnMinibatch", "PPOTrainer, half left out"])
def test_49_statistics_are_those_of_all_samples_together(case: str, ranks: Any, alone: Any) -> None:
    for report in ranks:
        assert_same(report[case], alone[case])


def test_49_spreads_are_those_of_the_numbers_themselves(ranks: Any) -> None:
    queries, responses, scores, _ = ranks_together.samples()
    numbers = {
        "tokens/queries_len": [float(len(q)) for q in queries],
        "tokens/responses_len": [float(len(r)) for r in responses],
    }
    for report in ranks:
        outcome = report["three steps"]
        for name, values in numbers.items():
            assert_close(outcome[f"{name}_mean"], statistics.mean(values))
            assert_close(outcome[f"{name}_std"], statistics.stdev(values))
        assert_close(outcome["ppo/mean_scores"], statistics.mean(map(float, scores)))
        assert_close(outcome["ppo/std_scores"], statistics.stdev(map(float, scores)))
        left = report["PPOTrainer, half left out"]
        assert_close(left["ppo/std_scores"], statistics.stdev(map(float, scores[:4])))


def test_49_what_is_logged_of_the_rewards_is_of_all_of_them(ranks: Any) -> None:
    scores = [float(score) for score in ranks_together.samples()[2]]
    assert_close(ranks[0]["logged"]["mean"], statistics.mean(scores))
    assert_close(ranks[0]["logged"]["std"], statistics.stdev(scores))
    assert ranks[0]["logged"]["count"] == 8


@pytest.mark.slow
def test_53_accelerate_trains_one_model_without_a_gpu() -> None:
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    first, second = reports(start(*launcher))
    assert [first["world"], second["world"]] == [2, 2]
    assert first["three steps"] == second["three steps"]


@pytest.mark.slow
def test_53_accelerate_that_starts_one_process_of_two_is_refused() -> None:
    """`--cpu` starts one, whatever the number is, where there is no MPI."""
    done = start("accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert done.returncode != 0
    assert "was asked for several processes but started only this one" in done.stderr
    assert "torchrun --nproc-per-node N" in done.stderr


@pytest.mark.slow
def test_53_processes_that_an_accelerator_of_the_scripts_keeps_apart_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "import os\n"
        "accelerator = Accelerator()\n"
        "from tests.conformance import ranks_together\n"
        "ranks_together.report(int(os.environ['RANK']), 2)\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = run_program([sys.executable, "-m", *TORCHRUN, str(script)], cwd=ROOT, env=environment)
    assert done.returncode != 0
    assert "2 processes were started but accelerate sees only one" in done.stderr
