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
import trl, trl.assets
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

def politeness(prompts, completions, **columns):
    return [float("a" in text) for text in completions]

name = trl.assets.path("tiny-gpt2-reviews")
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=2), model, tokenizer=AutoTokenizer.from_pretrained(name))
result = trainer.train(
    ["I thought", "This film"], reward=politeness, steps=2, run_dir=sys.argv[1], generation={"max_new_tokens": 4}
)
assert result.steps == 2
print("done")
"""


def test_s12_training_needs_no_network(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a network namespace")
    done = subprocess.run(
        [unshare, "-rn", sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("done")
