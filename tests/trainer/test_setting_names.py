"""Settings of other releases of TRL: accepted, explained, or named where they are meant."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest

from trl import OnlineTrainer, PPOConfig, PPOTrainer

RELEASES = Path(__file__).parents[1] / "compat/data/releases"


@pytest.mark.parametrize("path", sorted(RELEASES.glob("*.json")), ids=lambda path: path.stem)
def test_defaults_are_those_of_the_release(path: Path) -> None:
    config = PPOConfig.like(path.stem)
    unlike = {}
    for name, default in json.loads(path.read_text(encoding="utf-8"))["config"].items():
        if default not in ("<computed>", None) and getattr(config, name) != default:
            unlike[name] = getattr(config, name)
    unlike.pop("backward_batch_size", None)  # follows from the others; 0.5 and 0.6 said 1 and then overwrote it
    assert unlike == {}


def test_like_takes_settings_and_knows_its_releases() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PPOConfig.like("0.11", batch_size=256, reward_model="mine")
    assert (config.batch_size, config.mini_batch_size, config.learning_rate) == (256, 128, 1.41e-5)
    assert config.reward_model == "mine" and config.backward_batch_size == 128
    with pytest.raises(ValueError, match=r"version='1\.0' must be one of 0\.4, 0\.5"):
        PPOConfig.like("1.0")


def test_a_script_of_newer_releases_is_told_of_their_defaults() -> None:
    with pytest.warns(
        UserWarning, match=r"query_dataset is a setting of TRL 0\.7.*batch_size=256 \(128 there\)"
    ) as caught:
        PPOConfig(query_dataset="imdb", learning_rate=1e-4, mini_batch_size=2)
    assert "learning_rate" not in str(caught[0].message) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOConfig(query_dataset="imdb", learning_rate=1e-4, batch_size=16, mini_batch_size=2)
        PPOConfig(model_name="gpt2")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lerning_rate": 1e-4}, "PPOConfig has no setting lerning_rate: did you mean learning_rate?"),
        ({"output_dir": "x"}, "PPOConfig has no setting output_dir: use train(run_dir=...)"),
        ({"compile": True}, "PPOConfig has no setting compile, and needs none: compiled layers made updates no faster"),
        ({"xyzzy": 1}, "PPOConfig has no setting xyzzy"),
    ],
)
def test_what_is_no_setting(setting: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        PPOConfig(**setting)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_what_follows_from_other_settings() -> None:
    config = PPOConfig(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, backward_batch_size=7)
    assert config.backward_batch_size == 4
    assert replace(config, mini_batch_size=4).backward_batch_size == 8
    assert PPOConfig.like("0.7", optimize_device_cache=True).optimize_cuda_cache
    assert PPOConfig(optimize_cuda_cache=None).optimize_cuda_cache is False  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ratio_threshold=0 must be a number above 0 or None"):
        PPOConfig(ratio_threshold=0)


def test_new_settings_stand_behind_the_old_ones() -> None:
    names = [f.name for f in fields(PPOConfig)]
    assert names.index("compare_steps") < names.index("exp_name") < names.index("is_peft_model") == len(names) - 1


@pytest.mark.parametrize("kind", [PPOTrainer, OnlineTrainer])
def test_arguments_of_newer_trainers_are_named_as_they_are_here(kind: type) -> None:
    with pytest.raises(TypeError) as caught:
        kind(args=PPOConfig(), processing_class=None, model=None, train_dataset=[], value_model=None)
    assert str(caught.value) == (
        f"{kind.__name__} has no argument args: use config, a PPOConfig; no argument processing_class: use tokenizer; "
        "no argument train_dataset: use train(prompts), which takes a datasets.Dataset; no argument value_model, and needs "
        "none: values come from the value head of model (docs/migrate/trl-1.md)"
    )
    with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument tokeniser: did you mean tokenizer\?$"):
        kind(PPOConfig(), tokeniser=None)


def test_a_subclass_is_named_by_its_own_name_and_keeps_the_signature() -> None:
    mine = type("Mine", (PPOTrainer,), {})
    with pytest.raises(TypeError, match=r"^Mine has no argument xyzzy$"):
        mine(PPOConfig(), xyzzy=1)
    parameters = list(inspect.signature(mine).parameters)
    assert parameters[:4] == ["config", "model", "ref_model", "tokenizer"] and "kwargs" not in parameters
