"""The ten lines that the README and docs/runs.md show, word for word but for how long they take."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import trl
from tests.trainer.managed import HELD_OUT, events, run
from trl import assets
from trl.trackers import read_metrics

ROOT = Path(__file__).parents[2]


def snippet(page: str, heading: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"## {heading}\n(?:(?!^## ).)*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_ten_lines_run_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = snippet("README.md", "Your model, your reward")
    assert code == snippet("docs/runs.md", "Training in ten lines")
    lines = [line for line in code.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 10 and max(map(len, lines)) <= 120
    shutil.copytree(assets.path("tiny-gpt2-reviews"), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    for steps in (1, 2):
        short = code.replace("batch_size=64, mini_batch_size=16", "batch_size=4, mini_batch_size=2").replace(
            "steps=100", f"steps={steps}"
        )
        assert short != code
        names: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "objective/kl is")
            exec(compile(short, "README.md", "exec"), names)
        result = names["result"]
        assert (result.steps, result.reason) == (steps, "steps")
        assert [row["step"] for row in read_metrics("runs/polite")] == list(range(1, steps + 1))
    assert any("from step 1 to 2, from step-00000001" in line for line in events(tmp_path / "runs/polite"))
    assert (tmp_path / "runs/polite/model/v_head.safetensors").exists()


def test_every_key_of_a_row_and_every_argument_is_explained(tmp_path: Path) -> None:
    result = run(run_dir=tmp_path / "run", steps=1, eval_prompts=HELD_OUT)
    text = (ROOT / "docs/runs.md").read_text(encoding="utf-8") + (ROOT / "docs/ppo.md").read_text(encoding="utf-8")
    own = [key for key in result.metrics if not key.startswith(("reward/words/", "time/ppo"))]
    assert [key for key in own if f"`{key}`" not in text] == []
    docstring = trl.PPOTrainer.train.__doc__ or ""
    arguments = list(trl.PPOTrainer.train.__annotations__)
    assert [name for name in arguments if name != "return" and f"{name}: " not in docstring] == []
    for name in ("TrainCallback", "SpikeSettings", "SpikeError", "NonFiniteError", "TrainResult"):
        assert name in text and getattr(trl, name) is not None
