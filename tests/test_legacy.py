"""The tables of old names are consistent, and the finder of old modules disturbs no other import."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest

import trl
from trl import legacy


@pytest.mark.parametrize("module", legacy.ALIASES)
def test_aliases_are_the_objects_of_their_homes(module: str) -> None:
    for name in legacy.ALIASES[module]:
        home = importlib.import_module(legacy._HOME_OF[name])
        assert getattr(importlib.import_module(legacy._HOME_OF[name]), name) is vars(home)[name]
        assert legacy.lookup(module)(name) is vars(home)[name]


def test_every_home_is_asked_for() -> None:
    """A name that no old place asks for needs no home."""
    assert set(legacy._HOME_OF) == {name for names in legacy.ALIASES.values() for name in names}


def test_no_name_is_both_here_and_advised_against() -> None:
    paths = {f"{module}.{name}" for module, names in legacy.ALIASES.items() for name in names} | set(legacy.ALIASES)
    assert [path for path in sorted(paths) if legacy.advice(path)] == []


@pytest.mark.parametrize(
    ("statement", "path", "text"),
    [
        (
            "from trl.trainer import PPOv2Trainer",
            "trl.trainer.PPOv2Trainer",
            "\\(TRL 0.11 had it\\): use PPOTrainer.train",
        ),
        ("from trl.trainer.utils import empty_cache", "trl.trainer.utils.empty_cache", "use PPODecorators"),
        ("from trl.core import randn_tensor", "trl.core.randn_tensor", "TRL 0.7 to 0.11 had it.*use torch.randn"),
        ("from trl.models.utils import iter_params", "trl.models.utils.iter_params", "use deepspeed"),
        ("import trl.environment.base_environment", "trl.environment", "use ppo_trainer.step\\(..., response_masks"),
        ("import trl; trl.environment", "trl.environment", "response_masks"),
    ],
)
def test_what_is_not_here_says_what_to_use(statement: str, path: str, text: str) -> None:
    with pytest.raises(ImportError, match=f"^{path} is not part of trl .*{text}") as caught:
        exec(statement)
    assert caught.value.name == path


@pytest.mark.parametrize(
    "module", ["trl", "trl.core", "trl.import_utils", "trl.models", "trl.trainer", "trl.trainer.utils"]
)
def test_names_that_trl_never_had_are_attribute_errors(module: str) -> None:
    assert not hasattr(importlib.import_module(module), "SelfPlayTrainer")
    with pytest.raises(ImportError, match="cannot import name 'SelfPlayTrainer'"):
        exec(f"from {module} import SelfPlayTrainer")


def test_modules_that_trl_never_had_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'trl\.trainer\.self_play'"):
        importlib.import_module("trl.trainer.self_play")
    assert importlib.util.find_spec("trl.self_play") is None


def test_a_module_of_aliases_lists_its_names() -> None:
    scope: dict[str, object] = {}
    exec("from trl.models.modeling_base import *", scope)
    assert scope["PreTrainedModelWrapper"] is trl.PreTrainedModelWrapper
    assert importlib.import_module("trl.models.modeling_base") is sys.modules["trl.models.modeling_base"]


def test_the_finder_is_installed_once_and_last() -> None:
    before = list(sys.meta_path)
    legacy.install()
    assert sys.meta_path == before
    assert before.count(legacy._FINDER) == 1
