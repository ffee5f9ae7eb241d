"""S12: importing and training in an empty network namespace. What the interpreter sees: test_train_survives.py."""

from __future__ import annotations

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
TRACKERS = ("", "tensorboard", "wandb", "trackio", "mlflow")
CANARY = "hf_canaryCanaryCanary123"


@pytest.mark.parametrize("tracker", TRACKERS)
def test_s12_training_asks_no_network(tracker: str, tmp_path: Path) -> None:
    """Neither do the trackers, in their offline modes; and no secret of the environment is in what they write (S9)."""
    if tracker:
        pytest.importorskip(tracker)
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a network namespace")
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "run"), tracker],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "HF_TOKEN": CANARY,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(tmp_path / "trackio"),
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout.splitlines()
    assert f"tracker {tracker} failed" not in done.stderr, done.stderr[-2000:]
    places = {"tensorboard": "run/tensorboard", "wandb": "run/wandb", "trackio": "trackio", "mlflow": "mlflow"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not tracker or any(path.is_relative_to(tmp_path / places[tracker]) for path in files)
    secret = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert secret == [] and CANARY not in done.stdout + done.stderr
