"""Where TRL 0.4.6 had a name, an argument, a default or a setting, this library has it too.

`data/trl_0_4_6.json` holds what introspection of the released package gave: places of names, signatures ("name" or
["name", default], in order), the settings of PPOConfig, class attributes, statistics. Ours may add arguments behind.
"""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

FACTS = json.loads((Path(__file__).parent / "data" / "trl_0_4_6.json").read_text(encoding="utf-8"))
PLACES = [(module, name) for module, names in FACTS["places"].items() for name in names]


def lookup(path: str) -> Any:
    """The object at a dotted path whose first two parts are a module: "trl.core.LengthSampler.__call__"."""
    parts = path.split(".")
    found: Any = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:]:
        found = getattr(found, part)
    return found


def parameters(function: Any) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]


@pytest.mark.parametrize(("module", "name"), PLACES)
def test_name_is_where_it_was(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", FACTS["places"]["trl"])
def test_one_object_under_all_its_names(name: str) -> None:
    homes = [module for module, names in FACTS["places"].items() if name in names]
    assert len({id(getattr(importlib.import_module(home), name)) for home in homes}) == 1


@pytest.mark.parametrize("path", FACTS["signatures"])
def test_signature(path: str) -> None:
    ours = parameters(lookup(path))
    if FACTS["signatures"][path] == ["*args", "**kwargs"]:
        return  # passed everything on to another library
    kinds = {p.kind for p in ours}
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = FACTS["signatures"][path]
    named = [p for p in theirs if not (isinstance(p, str) and p.startswith("*"))]

    assert [p.name for p in positional[: len(named)]] == [p if isinstance(p, str) else p[0] for p in named]
    for mine, pinned in zip(positional, named, strict=False):
        if not isinstance(pinned, str):  # what was required may have become optional: that breaks nobody
            expected = -float("inf") if pinned[1] == "-inf" else pinned[1]
            assert mine.default == expected, f"{mine.name} had the default {expected!r}"
    for extra in set(ours) - set(positional[: len(named)]):
        added = extra.default is not extra.empty or extra.kind in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD)
        assert added, f"{extra.name} must have a default: no caller of 0.4.6 gives it"
    for stars, kind in (("**", inspect.Parameter.VAR_KEYWORD), ("*", inspect.Parameter.VAR_POSITIONAL)):
        if any(isinstance(p, str) and p.startswith(stars) and p.count("*") == len(stars) for p in theirs):
            assert kind in kinds, f"took {stars} arguments"


@pytest.mark.parametrize("name", FACTS["config"])
def test_setting_and_its_default(name: str) -> None:
    from trl import PPOConfig

    assert name in {f.name for f in fields(PPOConfig)}
    value = getattr(PPOConfig(), name)
    assert value == FACTS["config"][name]
    assert type(value) is type(FACTS["config"][name])


def test_settings_keep_their_order() -> None:
    from trl import PPOConfig

    assert list(inspect.signature(PPOConfig).parameters)[: len(FACTS["config"])] == list(FACTS["config"])


def test_dictionaries_of_two_configs_are_two() -> None:
    from trl import PPOConfig

    one, other = PPOConfig(), PPOConfig()
    one.tracker_kwargs["name"] = "run"
    assert other.tracker_kwargs == {}


def test_config_knows_the_number_of_its_steps() -> None:
    from trl import PPOConfig

    assert PPOConfig().total_ppo_epochs == 79  # 20000 samples in batches of 256
    config = PPOConfig(steps=10, batch_size=4, mini_batch_size=2)
    assert config.total_ppo_epochs == 3
    assert config.to_dict()["total_ppo_epochs"] == 3


def test_config_as_a_flat_dictionary() -> None:
    from trl import PPOConfig

    flat = PPOConfig(batch_size=2, tracker_kwargs={"wandb": {"name": "run"}}).to_dict()
    assert flat["batch_size"] == 2
    assert flat["tracker_kwargs/wandb/name"] == "run"
    assert {name for name, value in FACTS["config"].items() if value != {}} <= set(flat)


def test_old_name_of_the_mini_batch_size() -> None:
    from trl import PPOConfig

    with pytest.warns(UserWarning, match="forward_batch_size"):
        config = PPOConfig(batch_size=8, forward_batch_size=4)
    assert config.mini_batch_size == 4


@pytest.mark.parametrize("name", FACTS["class_attributes"])
def test_class_attributes(name: str) -> None:
    import transformers

    import trl

    for attribute, expected in FACTS["class_attributes"][name].items():
        value = getattr(getattr(trl, name), attribute)
        if attribute == "transformers_parent_class":
            assert value is (None if expected is None else getattr(transformers, expected))
        elif expected is not None:
            assert set(value) >= set(expected), attribute


def test_supported_architectures_are_the_two_value_head_models() -> None:
    import trl

    expected = {trl.AutoModelForCausalLMWithValueHead, trl.AutoModelForSeq2SeqLMWithValueHead}
    assert set(trl.models.SUPPORTED_ARCHITECTURES) == expected
    assert all(issubclass(architecture, trl.PreTrainedModelWrapper) for architecture in expected)


def test_kl_controllers() -> None:
    from trl import AdaptiveKLController, FixedKLController

    adaptive = AdaptiveKLController(0.2, 6, 10000)
    assert (adaptive.value, adaptive.target, adaptive.horizon) == (0.2, 6, 10000)
    adaptive.update(7, 256)
    assert adaptive.value == pytest.approx(0.2 * (1 + (7 / 6 - 1) * 256 / 10000))
    adaptive.update(60, 100)  # an error above 0.2 counts as 0.2
    assert adaptive.value == pytest.approx(0.2 * (1 + (7 / 6 - 1) * 256 / 10000) * (1 + 0.2 * 100 / 10000))
    fixed = FixedKLController(0.1)
    fixed.update(7, 256)
    assert fixed.value == 0.1
