"""docs/sft.md: its snippets run one after the other, and it names every key that is logged and every field."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from trl.trainer.offline.sft_config import SFTConfig

PAGE = Path(__file__).parents[3] / "docs/sft.md"


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 4 and len(snippets[0].splitlines()) <= 10
    names: dict[str, Any] = {}
    for number, code in enumerate(snippets):
        assert max(map(len, code.splitlines())) <= 130
        exec(compile(code, f"docs/sft.md, snippet {number}", "exec"), names)
    assert (tmp_path / "runs/sft/model/model.safetensors").exists()
    assert (tmp_path / "runs/sft-lora/adapter/adapter_model.safetensors").exists()
    keys = set(names["trainer"].state.log_history[0]) | {"entropy", "mean_token_accuracy", "num_tokens"}
    text = PAGE.read_text(encoding="utf-8")
    assert [key for key in keys - {"step"} if f"`{key}`" not in text and not key.startswith(("train_", "total_"))] == []


def test_every_setting_of_sft_is_explained() -> None:
    own = [f for f in fields(SFTConfig) if f.metadata.get("help")]
    assert [f.name for f in own if not f.metadata["help"].strip()] == []
