"""What releases of other packages call things."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

from trl import import_utils
from trl.import_utils import cache_keyword


@pytest.mark.parametrize(
    ("parameters", "keyword"),
    [
        (["input_ids", "past_key_values"], "past_key_values"),
        (["input_ids", "cache"], "cache"),
        (["input_ids", "cache", "past_key_values"], "past_key_values"),  # a model's own code, and a cache of its own
        (["input_ids", "kwargs"], "past_key_values"),
    ],
)
def test_cache_keyword(parameters: list[str], keyword: str) -> None:
    assert cache_keyword(parameters) == keyword


@pytest.mark.parametrize(
    ("function", "package"),
    [
        ("is_bitsandbytes_available", "bitsandbytes"),
        ("is_diffusers_available", "diffusers"),
        ("is_liger_available", "liger_kernel"),
        ("is_liger_kernel_available", "liger_kernel"),
        ("is_llmblender_available", "llm_blender"),
        ("is_openai_available", "openai"),
        ("is_peft_available", "peft"),
        ("is_pil_available", "PIL"),
        ("is_rich_available", "rich"),
        ("is_sklearn_available", "sklearn"),
        ("is_torchvision_available", "torchvision"),
        ("is_unsloth_available", "unsloth"),
        ("is_wandb_available", "wandb"),
    ],
)
def test_a_package_is_available_if_it_can_be_found(
    monkeypatch: pytest.MonkeyPatch, function: str, package: str
) -> None:
    available = getattr(import_utils, function)
    for there in (True, False):
        spec = object() if there else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec if name == package else None)
        assert available() is there
    assert package in available.__doc__


@pytest.mark.parametrize("device", ["npu", "xpu"])
def test_devices_are_those_that_torch_can_use(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    for there in (True, False):
        monkeypatch.setattr(f"accelerate.utils.is_{device}_available", lambda there=there: there)
        assert getattr(import_utils, f"is_{device}_available")() is there


@pytest.mark.parametrize(("version", "newer"), [("4.40.0", True), ("5.9", True), ("5.20.1", False), ("10.0", False)])
def test_versions_compare_as_numbers(monkeypatch: pytest.MonkeyPatch, version: str, newer: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"transformers": "5.20.1"}.__getitem__)
    assert import_utils.is_transformers_greater_than(version) is newer


def test_accelerate_is_new_enough() -> None:
    import accelerate

    assert import_utils.is_accelerate_greater_20_0() is True
    assert int(accelerate.__version__.split(".")[0]) >= 1
