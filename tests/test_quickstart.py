"""The README's quick start, word for word, in a directory that holds a GPT-2 folder named `gpt2`."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from trl import assets

README = Path(__file__).parents[1] / "README.md"


def test_quick_start_runs_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    shutil.copytree(assets.path("tiny-gpt2-reviews"), tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no dataset is given")
        exec(compile(code.group(1), "README.md", "exec"), names)
    stats, model, reference = names["train_stats"], names["model"], names["model_ref"]
    assert names["response_tensor"].shape == (1, 20)
    assert stats["ppo/mean_scores"] == 1.0
    assert abs(stats["objective/kl"]) < 1e-4  # the policy was the reference when it was evaluated
    assert stats["tokens/responses_len_mean"] == 20.0
    assert all(math.isfinite(value) for value in stats.values() if isinstance(value, float))
    moved = [
        name
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert len(moved) > 10
