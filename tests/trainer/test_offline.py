"""S12: importing and training in an empty network namespace. What the interpreter sees: test_train_survives.py."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys

attempts = []

def watch(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        attempts.append((event, arguments[1] if event == "socket.connect" else arguments[:2]))

sys.addaudithook(watch)  # clients may swallow their failures
import trl, trl.assets
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

def politeness(prompts, completions, **columns):
    return [float("a" in text) for text in completions]

name = trl.assets.path("tiny-gpt2-reviews")
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
trackers = sys.argv[2].split(",") if sys.argv[2] else None
config = PPOConfig(batch_size=2, mini_batch_size=2, log_with=trackers)
trainer = PPOTrainer(config, model, tokenizer=AutoTokenizer.from_pretrained(name))
result = trainer.train(
    ["I thought", "This film"], reward=politeness, steps=2, run_dir=sys.argv[1], generation={"max_new_tokens": 4}
)
assert result.steps == 2
trainer.evaluate(["One"], politeness, generation={"max_new_tokens": 4})
assert attempts == [], attempts
print("done")
"""
PLACES = {"tensorboard": "run/tensorboard", "wandb": "run/wandb", "trackio": "trackio", "mlflow": "mlflow"}
CANARY = "hf_canaryCanaryCanary123"


def train_offline(folder: Path, trackers: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the program in an empty network namespace; neither it nor a tracker may fail."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a network namespace")
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder / "run"), ",".join(trackers)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": CANARY,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder / "trackio"),
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout.splitlines()
    return done


def check(done: subprocess.CompletedProcess[str], folder: Path, trackers: list[str]) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for tracker in trackers:
        assert f"tracker {tracker} failed" not in done.stderr, done.stderr[-2000:]
        assert any(path.is_relative_to(folder / PLACES[tracker]) for path in files), tracker
    secret = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert secret == [] and CANARY not in done.stdout + done.stderr


def test_s12_training_asks_no_network(tmp_path: Path) -> None:
    """Neither do the trackers, in their offline modes; and no secret of the environment is in what they write (S9).

    All of them in one run, as the imports cost most of the time; `make slow` has each alone, and a run without any.
    """
    trackers = [name for name in PLACES if importlib.util.find_spec(name)]
    check(train_offline(tmp_path, trackers), tmp_path, trackers)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["", *PLACES])
def test_s12_training_with_one_tracker_asks_no_network(tracker: str, tmp_path: Path) -> None:
    if tracker:
        pytest.importorskip(tracker)
    trackers = [tracker] if tracker else []
    check(train_offline(tmp_path, trackers), tmp_path, trackers)
