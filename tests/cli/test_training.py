"""`trl ppo`, `trl grpo` and `trl resume`: the whole way in one process; and, slowly, as a user types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.conftest import forget_modules
from tests.cli.helpers import CONFIG, write_project
from trl.cli.app import main
from trl.trackers import read_metrics, without_times

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTS = """\
import signal
from pathlib import Path

def polite(prompts, completions, **columns):
    if not Path("interrupted").exists():
        Path("interrupted").touch()
        signal.raise_signal(signal.SIGINT)
    return [float("good" in text) + len(text) / 100 for text in completions]
"""


def rows(run: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read_metrics(run)]


def copy_of(finished_run: Path, folder: Path) -> Path:
    shutil.copytree(finished_run, folder, dirs_exist_ok=True)
    return folder / "runs" / "run"


def test_a_run_keeps_its_settings_and_their_sources(finished_run: Path) -> None:
    kept = yaml.safe_load((finished_run / "runs" / "run" / "config.resolved.yaml").read_text())
    launch = kept["launch"]
    assert launch["command"] == "ppo" and launch["folder"] == str(finished_run)
    assert launch["settings"]["ppo"]["learning_rate"] == kept["ppo"]["learning_rate"] == 3e-4
    assert launch["sources"]["ppo.learning_rate"] == "run.yaml:5" and launch["sources"]["ppo.lam"] == "default"
    assert launch["settings"]["reward"]["functions"] == {"polite": f"{finished_run}/rewards.py:polite"}
    assert list(launch["files"]) == [f"{finished_run}/rewards.py"]
    assert (finished_run / "runs" / "run" / "model" / "config.json").exists()
    assert (finished_run / "runs" / "run" / "report.html").exists()
    assert len(rows(finished_run / "runs" / "run")) == 2


def test_ctrl_c_and_resume_go_on_to_the_same_numbers(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(tmp_path)
    (tmp_path / "rewards.py").write_text(INTERRUPTS)
    assert main(["ppo", "run.yaml"]) == 130
    message = capsys.readouterr().err
    assert "saved step 1; run `trl resume runs/run` to go on" in message and "Traceback" not in message
    assert main(["runs"]) == 0
    assert "stopped  1/2" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # the run folder is all that is needed
    (elsewhere / "interrupted").touch()
    assert main(["resume", str(tmp_path / "runs" / "run")]) == 0
    message = capsys.readouterr().err
    assert "finished: 2 steps, 8 samples; the last 1 in 0:0" in message
    first, last = rows(tmp_path / "runs" / "run")
    before, after = first["eval_before/score_mean"], last["eval/score_mean"]
    assert f"mean score on held-out prompts {before:.3f} -> {after:.3f}" in message
    for part in ("model    ", "report   ", "summary  ", "trl eval ", "trl report "):
        assert part in message
    assert rows(tmp_path / "runs" / "run") == rows(finished_run / "runs" / "run")


def test_a_finished_run_is_left_alone_or_trained_on(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished_run, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["resume", "run"]) == 0  # a name in runs/
    assert "is finished: --steps with a higher number trains on" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert main(["resume", "runs/run", "--steps", "3", "--learning_rate", "1e-4"]) == 0
    message = capsys.readouterr().err
    assert "changed: train.steps: 2 -> 3 (--steps)" in message
    assert "changed: ppo.learning_rate: 0.0003 -> 0.0001 (--learning_rate)" in message
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    kept = yaml.safe_load((run / "config.resolved.yaml").read_text())["launch"]
    assert kept["sources"]["train.steps"] == "--steps" and kept["sources"]["ppo.batch_size"] == "run.yaml:6"
    events = (run / "events.log").read_text()
    assert "setting changed: train.steps: 2 -> 3" in events and "launch." not in events


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_reward_that_is_no_more_what_it_was(
    change: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(finished_run, tmp_path)
    text = (run / "config.resolved.yaml").read_text()
    (run / "config.resolved.yaml").write_text(text.replace(str(finished_run), str(tmp_path)))
    rewards = tmp_path / "rewards.py"
    rewards.write_text(rewards.read_text() + "# another\n") if change == "changed" else rewards.unlink()
    assert main(["resume", "runs/run", "--steps", "3"]) == 2
    message = capsys.readouterr().err
    assert ("has changed since the run began" if change == "changed" else "is gone") in message
    assert f"--reward polite={tmp_path}/rewards.py:polite" in message
    assert len(rows(run)) == 2
    if change == "changed":
        assert main(["resume", "runs/run", "--steps", "3", "--reward", "polite=rewards.py:polite"]) == 0
        assert len(rows(run)) == 3


def test_a_reward_that_failed_in_the_first_step_is_fixed_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing has been learnt with the reward as it was, so nobody has to name it again."""
    write_project(tmp_path)
    right = (tmp_path / "rewards.py").read_text()
    (tmp_path / "rewards.py").write_text("def polite(prompts, completions):\n    return [1 / 0 for _ in completions]\n")
    assert main(["ppo", "run.yaml"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    (tmp_path / "rewards.py").write_text(right)
    forget_modules(tmp_path)
    assert main(["resume", "runs/run"]) == 0
    assert "runs/run has no checkpoint: it starts again, with the reward as it is now" in capsys.readouterr().err
    assert len(rows(tmp_path / "runs" / "run")) == 2
    (tmp_path / "rewards.py").write_text(right + "# another\n")
    assert main(["resume", "runs/run", "--steps", "3"]) == 2  # it has learnt from this one


def test_scores_of_one_kind_are_compared(tmp_path: Path) -> None:
    from trl.cli.training import _scores
    from trl.trackers import RunDirectory

    with RunDirectory.create(tmp_path / "run") as run:
        run.log({"score/mean": 0.25}, 1)
        assert _scores(run.path) == ""
        run.log({"score/mean": 0.5, "eval/score_mean": 0.75}, 2)
        assert _scores(run.path) == "; mean score 0.250 -> 0.500"
        run.log({"score/mean": float("nan"), "eval/score_mean": 0.625}, 3)
        assert _scores(run.path) == "; mean score on held-out prompts 0.750 -> 0.625"


def test_grpo_reads_the_same_file(tmp_path: Path) -> None:
    write_project(tmp_path)
    assert main(["grpo", "run.yaml", "--group-size", "2", "--steps", "1", "--grpo.kl-coef", "0"]) == 0
    kept = yaml.safe_load((tmp_path / "runs" / "run" / "config.resolved.yaml").read_text())
    assert kept["algorithm"]["name"] == "grpo" and kept["launch"]["command"] == "grpo"


def test_a_schedule_goes_down_to_nothing(tmp_path: Path) -> None:
    write_project(tmp_path)
    assert main(["ppo", "run.yaml", "--schedule", "linear", "--steps", "3", "--warmup-steps", "1", "--no-doctor"]) == 0
    rates = [row["ppo/learning_rate"] for row in rows(tmp_path / "runs" / "run")]
    assert rates == pytest.approx([0.0, 3e-4, 1.5e-4])  # a step of warming up, then 2 of 2, then 1 of 2


def test_dry_run_shows_settings_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["ppo", "run.yaml", "--dry-run", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    values, _, estimate = printed.partition("\n\n")
    shown = yaml.safe_load(values)
    assert shown["ppo"]["seed"] == 7 and shown["ppo"]["learning_rate"] == 3e-4 and shown["train"]["steps"] == 2
    lines = {line.split(":")[0].strip(): line for line in values.splitlines()}
    assert lines["seed"].endswith("# --seed") and lines["ppo_epochs"].endswith("# run.yaml:8")
    assert lines["lam"].endswith("# default") and "optimizer steps" in estimate
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--accelerator-kwargs", "{mixed_precison: bf16}"], "--accelerator-kwargs: Accelerator of accelerate has no argument mixed_precison: did you mean mixed_precision?"),
        (["--model", "nobody/nothing"], "--model: 'nobody/nothing' is neither a local folder"),
        (["--eval-every", "3", "--held-out", "0"], "--eval-every: train.eval_every=3 needs eval_prompts"),
        (["--held-out", "197"], "--held-out: data.held_out=197 leaves none of 197 prompts"),
        (["--whiten-rewards=maybe"], "--whiten-rewards: ppo.whiten_rewards: 'maybe' is not true or false"),
    ],
)  # fmt: skip
def test_mistakes_that_show_late_still_have_a_place(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(tmp_path)
    assert main(["ppo", "run.yaml", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_settings_of_ppo_alone_are_refused_for_grpo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(tmp_path, CONFIG.replace("ppo_epochs: 1", "cliprange: 0.3"))
    assert main(["grpo", "run.yaml", "--group-size", "2"]) == 2
    assert "cliprange" in capsys.readouterr().err


def test_a_reward_that_fails_ends_the_run_with_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_project(tmp_path)
    (tmp_path / "rewards.py").write_text("def polite(prompts, completions):\n    return 1 / 0\n")
    assert main(["ppo", "run.yaml"]) == 1
    message = capsys.readouterr().err
    assert "ZeroDivisionError" in message and "rewards.py" in message and "line 2" in message
    assert main(["runs"]) == 0
    assert "failed" in capsys.readouterr().out


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "trl.cli", *words]


@pytest.mark.slow
def test_the_whole_story_as_a_user_types_it(tmp_path: Path) -> None:
    """Train on ten lines of YAML with a reward of one's own, Ctrl-C, resume, report, evaluate, generate."""
    write_project(tmp_path, CONFIG.replace("steps: 2", "steps: 30"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(command(*words), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = []
    with subprocess.Popen(
        command("ppo", "run.yaml"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    message = "".join(said)
    assert "Traceback" not in message and "Ctrl-C again stops at once" in message
    saved = json.loads((tmp_path / "runs/run/checkpoints/latest.json").read_text())["step"]
    assert 1 <= saved < 30 and f"saved step {saved}; run `trl resume runs/run` to go on" in message
    assert "finished: 30 steps" in run("resume", "runs/run")
    assert "runs/run/report.html" in run("report", "runs/run")
    assert "trained" in run("eval", "runs/run")
    assert run("generate", "runs/run", "--prompt", "It was").startswith("It was")
    assert "finished  30/30" in run("runs")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    write_project(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "import time\n\ndef polite(prompts, completions):\n    print('scoring', flush=True)\n    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command("ppo", "run.yaml"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and "scoring" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is saved" in errors and "Traceback" not in errors
