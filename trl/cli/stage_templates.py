"""What `trl config init sft`, `reward`, `dpo` and `kto` write: a configuration, and a few rows to try it on."""

from __future__ import annotations

import json

_HEAD = """\
# trl {stage} {name}
model: tiny-gpt2-reviews         # a folder, a hub id, or this film-review model, which is in the package
data:
  dataset: {rows}{gap}# yours: a .jsonl, .csv or .parquet file, or a hub id; columns: {columns}
  held_out: 4                    # rows to evaluate on
"""
_COMMON = """\
  per_device_train_batch_size: 4 # rows per pass
  gradient_accumulation_steps: 1 # passes per optimizer step
  max_length: 512                # tokens of a row
  logging_steps: 1
"""
_SETTINGS = {
    "sft": """\
sft:
  num_train_epochs: 3
  learning_rate: 3e-4            # 2e-5 for a model of 100 million parameters
""",
    "reward": """\
reward_model:
  num_train_epochs: 1            # more than one usually overfits
  learning_rate: 3e-4            # 1e-5 for a model of 100 million parameters
  center_rewards_coefficient: 0.01
""",
    "dpo": """\
dpo:
  num_train_epochs: 1
  learning_rate: 1e-4            # 1e-6 for a model of 100 million parameters
  beta: 0.1                      # how strongly the policy is held to its reference
""",
    "kto": """\
kto:
  num_train_epochs: 1
  learning_rate: 1e-4            # 1e-6 for a model of 100 million parameters
  beta: 0.1                      # how strongly the policy is held to its reference
""",
}
_COLUMNS = {
    "sft": "text; messages; or prompt, completion",
    "reward": "chosen, rejected; and perhaps prompt, margin",
    "dpo": "prompt, chosen, rejected",
    "kto": "prompt, completion, label",
}
_PROMPTS = ("This film was", "The actors are", "The story", "I thought the ending", "The music", "My friends found it")
_GOOD = (" a joy from start to end.", " a pleasure, and I would watch it again.")
_BAD = (" a bore from start to end.", " a waste of two hours.")


def template(stage: str, name: str, rows: str) -> str:
    """The configuration of a stage.

    Args:
        stage: the stage's command.
        name: the file's name.
        rows: name of the file of rows.
    """
    gap = " " * max(1, 22 - len(rows))
    head = _HEAD.format(stage=stage, name=name, rows=rows, gap=gap, columns=_COLUMNS[stage])
    return head + _SETTINGS[stage] + _COMMON


def example_rows(stage: str) -> str:
    """A few rows for a stage, as JSON lines."""
    triples = [(prompt, good, bad) for prompt in _PROMPTS for good in _GOOD for bad in _BAD]
    rows: list[dict[str, object]] = []
    for number, (prompt, good, bad) in enumerate(triples):
        if stage == "sft":
            rows.append({"prompt": prompt, "completion": good})
        elif stage == "kto":
            rows.append({"prompt": prompt, "completion": bad if number % 2 else good, "label": number % 2 == 0})
        else:
            rows.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return "".join(json.dumps(row) + "\n" for row in rows)
