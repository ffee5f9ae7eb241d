"""Every name and module of the PPO side of TRL 0.4 to 0.11 is here, or says which releases had it and what to use.

`data/releases` holds the facts (scripts/read_old_trl.py); docs/compat.md shows the answers.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data" / "releases"
RELEASES = sorted(
    (json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("*.json")),
    key=lambda release: [int(part) for part in release["version"].split(".")],
)
PLACES = sorted(
    {(place, name) for release in RELEASES for place in release["places"] for name in release["places"][place]}
)
MODULES = sorted({module for release in RELEASES for module in release["modules"]})


def span(versions: Iterable[str]) -> str:
    """The first and the last minor release: "0.5 to 0.11"."""
    ends = [version.rpartition(".")[0] for version in versions]
    return ends[0] if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def check(error: ImportError, path: str, versions: list[str]) -> None:
    """The message names what was asked for, or the package that it was in, and what to use."""
    found = re.fullmatch(r"(\S+) is not part of trl \S+(?: yet)? \(TRL (.+) had it\): use (.+)", str(error))
    assert found, str(error)
    assert path == found[1] or path.startswith(f"{found[1]}.")
    if path == found[1]:
        assert found[2] == span(versions)


@pytest.mark.parametrize(("module", "name"), PLACES)
def test_name_is_here_or_says_what_to_use(module: str, name: str) -> None:
    versions = [r["version"] for r in RELEASES if any(name in names for names in r["places"].values())]
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        check(error, f"{module}.{name}", versions)
    else:
        assert found is not None


@pytest.mark.parametrize("module", MODULES)
def test_module_is_here_or_says_what_to_use(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        check(error, module, [r["version"] for r in RELEASES if module in r["modules"]])


# What scripts of that time import, so that no entry of the tables can refuse it.
WORKING = """
    trl.trainer.utils.RunningMoments trl.trainer.utils.pad_to_length trl.trainer.utils.disable_dropout_in_model
    trl.trainer.utils.exact_div trl.trainer.utils.PeftSavingCallback trl.trainer.utils.AdaptiveKLController
    trl.trainer.model_config.ModelConfig trl.ModelConfig trl.get_peft_config trl.get_quantization_config
    trl.get_kbit_device_map trl.setup_chat_format trl.models.utils.unwrap_model_for_generation
    trl.models.unwrap_model_for_generation trl.models.utils.ChatMlSpecialTokens trl.models.utils.FORMAT_MAPPING
    trl.models.modeling_base.LAYER_PATTERNS trl.models.modeling_base.create_reference_model
    trl.models.modeling_value_head.ValueHead trl.core.is_npu_available trl.core.is_xpu_available
    trl.import_utils.is_transformers_greater_than trl.is_wandb_available trl.trainer.RunningMoments
"""


@pytest.mark.parametrize("path", WORKING.split())
def test_name_works(path: str) -> None:
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(getattr(found, "__module__", module)), name, found)
