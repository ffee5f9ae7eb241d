"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

# Ten lines that train for seconds on the models in the package, with a reward of the user's own.
CONFIG = """\
model: tiny-gpt2-reviews
data: {prompts: review-openings, held_out: 8}
reward: rewards.py:polite
ppo:
  learning_rate: 3e-4
  batch_size: 4
  mini_batch_size: 2
  ppo_epochs: 1
generation: {max_new_tokens: 4}
train: {steps: 2, save_every: 1}
"""
REWARDS = """\
def polite(prompts, completions, **columns):
    return [float("good" in text) + len(text) / 100 for text in completions]
"""


def write_project(folder: Path, config: str = CONFIG) -> Path:
    """A folder with run.yaml and rewards.py; returns the configuration's path."""
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    (folder / "run.yaml").write_text(config, encoding="utf-8")
    return folder / "run.yaml"
