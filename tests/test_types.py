"""What a user's type checker sees: the classes that loading and copying return, under their public names."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
from torch import nn
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)

class Mine(AutoModelForCausalLMWithValueHead):
    def shout(self) -> str:
        return "!"

decoder = AutoModelForCausalLMWithValueHead.from_pretrained("gpt2")
reveal_type(decoder)
reveal_type(AutoModelForSeq2SeqLMWithValueHead.from_pretrained("t5"))
reveal_type(Mine.from_pretrained("gpt2"))
reveal_type(create_reference_model(decoder, num_shared_layers=1))
reveal_type(create_reference_model(Mine.from_pretrained("gpt2")))
reveal_type(create_reference_model(nn.Linear(1, 1)))
PPOTrainer(PPOConfig(), decoder, create_reference_model(decoder))
decoder.no_such_method("x")(1)
create_reference_model("gpt2")
"""
CAUSAL = "trl.models.autos.AutoModelForCausalLMWithValueHead"


def test_loading_and_copying_are_annotated() -> None:
    from trl import PreTrainedModelWrapper, create_reference_model

    loaded = inspect.signature(PreTrainedModelWrapper.from_pretrained.__func__)
    assert f"type[{loaded.return_annotation}]" == loaded.parameters["cls"].annotation
    copied = inspect.signature(create_reference_model)
    assert copied.return_annotation == copied.parameters["model"].annotation != "Any"


@pytest.mark.slow
def test_mypy_knows_what_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache"),
            str(script),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert revealed == [
        CAUSAL, "trl.models.autos.AutoModelForSeq2SeqLMWithValueHead", "script.Mine", CAUSAL, "script.Mine",
        "torch.nn.modules.linear.Linear",
    ]  # fmt: skip
    # An unknown method is a tensor or module to nn.Module's own __getattr__; a text is no model.
    assert re.findall(r"error: .*\[([\w-]+)\]", done.stdout) == ["operator", "type-var"], done.stdout
