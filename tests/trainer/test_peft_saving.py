"""`PeftSavingCallback`: a checkpoint of `transformers.Trainer` holds the adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from tests.helpers import tiny_gpt2
from tests.models.lora import lora
from trl.trainer.peft_saving import PeftSavingCallback


@pytest.mark.parametrize("saves", [True, False])
def test_the_process_that_saves_writes_the_adapter_alone(tmp_path: Path, saves: bool) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in ("pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"old")
    model = lora(tiny_gpt2())
    callback = PeftSavingCallback()
    assert isinstance(callback, TrainerCallback)
    arguments = SimpleNamespace(should_save=saves, output_dir=str(tmp_path))
    callback.on_save(arguments, SimpleNamespace(global_step=3), None, model=model, tokenizer=None)
    names = {path.name for path in folder.iterdir()}
    assert ("adapter_model.safetensors" in names) is saves
    assert ("pytorch_model.bin" in names) is not saves
    assert "optimizer.pt" in names
