"""S12: importing, scoring and training, without a tracker and with every one, in an empty network namespace."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys

strict, allowed, attempts = True, {"socket.gethostname"}, []

def watch(event, arguments):
    if strict and event.startswith("socket.") and event not in allowed:
        os.write(2, f"{event} {arguments}".encode())
        os._exit(9)
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        attempts.append((event, arguments[1] if event == "socket.connect" else arguments[:2]))

sys.addaudithook(watch)  # clients may swallow their failures
import trl.rewards
for name in trl.rewards.__all__:
    getattr(trl.rewards, name)
from tests.rewards import hostile
from tests.rewards.samples import samples
reward = trl.rewards.as_reward([hostile.length, trl.rewards.LengthPenalty(3)], cache=True)
assert reward.score(samples("one")).scores == [3.0]
isolated = trl.rewards.as_reward(hostile.length, isolation="process")
assert isolated.score(samples("one")).scores == [3.0]
isolated.close()
trl.rewards.JudgeReward("https://host/v1", "m"), trl.rewards.RemoteReward("https://host/")
print("scored")

allowed.add("socket.__new__")  # made by an import, and never connected
import trl, trl.assets
for name in trl.__all__:
    getattr(trl, name)
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

def politeness(prompts, completions, **columns):
    return [float("a" in text) for text in completions]

def train(folder, trackers):
    name = trl.assets.path("tiny-gpt2-reviews")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
    config = PPOConfig(batch_size=2, mini_batch_size=2, log_with=trackers)
    trainer = PPOTrainer(config, model, tokenizer=AutoTokenizer.from_pretrained(name))
    result = trainer.train(
        ["I thought", "This film"], reward=politeness, steps=2, run_dir=folder, eval_prompts=["A"],
        generation={"max_new_tokens": 4},
    )
    assert result.steps == 2
    trainer.evaluate(["One"], politeness, generation={"max_new_tokens": 4})

train(sys.argv[1] + "/alone", None)
print("alone")
strict = False  # the trackers' own processes talk through local sockets
if sys.argv[2]:
    import huggingface_hub
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # as HF_HUB_OFFLINE=1: Trackio asks the hub who the user is
    train(sys.argv[1] + "/run", sys.argv[2].split(","))
assert attempts == [], attempts
print("done")
"""
PLACES = {"tensorboard": "run/tensorboard", "wandb": "run/wandb", "trackio": "trackio", "mlflow": "mlflow"}
CANARY = "hf_canaryCanaryCanary123"


def namespace() -> list[str]:
    """The words that start a program in an empty network namespace; none where the machine does not allow it."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
        return []
    return [unshare, "-rn"]


def train_offline(folder: Path, trackers: list[str]) -> None:
    """No socket is opened without trackers; with them, nothing is asked, nothing fails and no secret is written (S9)."""
    done = subprocess.run(
        [*namespace(), sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), ",".join(trackers)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={  # without HF_HUB_OFFLINE: importing and training ask nothing, whether told to or not
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "HF_TOKEN": CANARY,
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "TRACKIO_DIR": str(folder / "trackio"),
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_TRACKING_URI": (folder / "mlflow").as_uri(),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"scored", "alone", "done"} <= set(done.stdout.splitlines())
    files = [path for path in folder.rglob("*") if path.is_file()]
    for tracker in trackers:
        assert f"tracker {tracker} failed" not in done.stderr, done.stderr[-2000:]
        assert any(path.is_relative_to(folder / PLACES[tracker]) for path in files), tracker
    secret = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert secret == [] and CANARY not in done.stdout + done.stderr


def test_s12_importing_scoring_and_training_ask_no_network(tmp_path: Path) -> None:
    """Without trackers, then with all of them: one process, as imports cost most of the time.

    `make slow` has each tracker alone. Trackers need the empty namespace, so that a failure here reaches no server.
    """
    train_offline(tmp_path, [name for name in PLACES if importlib.util.find_spec(name)] if namespace() else [])


@pytest.mark.slow
@pytest.mark.parametrize("tracker", PLACES)
def test_s12_one_tracker_asks_no_network(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    if not namespace():
        pytest.skip("this machine lets nobody make a network namespace")
    train_offline(tmp_path, [tracker])
