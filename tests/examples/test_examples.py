"""The examples run from end to end; and, slowly, do what they are there for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


QUICK = ["--steps", "2", "--batch-size", "8", "--new-tokens", "6"]


def test_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("peft")
    result = load("lora_sentiment").main([*QUICK, "--out", str(tmp_path)])
    assert set(result) == {"first_score", "last_score", "last_kl"}
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    assert "step 2/2" in capsys.readouterr().out


def test_lora_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="pip install peft"):
        load("lora_sentiment").main(QUICK)


def test_t5(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = load("t5_sentiment").main([*QUICK, "--pretrain-steps", "3", "--out", str(tmp_path)])
    assert set(result) == {"first_score", "last_score", "last_kl"}
    assert (tmp_path / "model.safetensors").exists()
    assert "step 2/2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_sentiment", "t5_sentiment"])
def test_score_rises(tmp_path: Path, name: str):
    if name.startswith("lora"):
        pytest.importorskip("peft")
    result = load(name).main(["--out", str(tmp_path)])
    assert result["last_score"] > result["first_score"] + 0.5
    assert 0 < result["last_kl"] < 20
