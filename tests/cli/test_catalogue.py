"""Every setting has a meaning, a type and a flag; names of TRL 1 lead to settings that exist."""

from __future__ import annotations

from dataclasses import fields

import pytest

from trl.cli import catalogue
from trl.cli.convert import expected
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.setting_names import EXPLAINED, RENAMED


@pytest.mark.parametrize("stage", catalogue.STAGES)
def test_settings_of_a_stage_are_explained_and_have_a_flag(stage: str) -> None:
    flags = catalogue.shortest_flags(stage)
    assert list(catalogue.setting_names(stage)) and set(flags) == set(catalogue.settings(stage))
    for path, setting in catalogue.settings(stage).items():
        assert setting.meaning.endswith((".", ")", "`")), path
        assert "<" not in expected(setting.kind) and "typing" not in expected(setting.kind), path
        assert catalogue.find(flags[path][2:], command=stage) is setting
    assert flags[f"{catalogue.STAGES[stage]}.learning_rate"] == "--learning-rate" and flags["lora.r"] == "--lora.r"


@pytest.mark.parametrize("stage", catalogue.STAGES)
def test_every_field_of_a_stages_class_is_a_setting_or_is_left_out_by_name(stage: str) -> None:
    section = catalogue.STAGES[stage]
    names = {field.name for field in fields(catalogue.section_class(section, stage))}
    settings = {setting.name for setting in catalogue.settings(stage).values() if setting.section == section}
    assert settings == names - set(catalogue.NOT_STAGE_SETTINGS)


def test_every_name_that_is_left_out_is_a_field_of_a_stage() -> None:
    names = {f.name for s, section in catalogue.STAGES.items() for f in fields(catalogue.section_class(section, s))}
    assert set(catalogue.NOT_STAGE_SETTINGS) <= names


@pytest.mark.parametrize(
    ("stage", "name", "section", "said"),
    [
        ("sft", "max_step", "sft", ": did you mean max_steps?"),
        ("sft", "steps", "train", ": use sft.max_steps"),
        ("dpo", "eval_every", "train", ": use dpo.eval_steps"),
        ("reward", "output_dir", "reward_model", ": use train.run_dir"),
        ("kto", "prompts", "data", ": use data.dataset"),
        ("sft", "learning_rate", "train", ": use sft.learning_rate"),
        ("sft", "reference", "model", ""),
    ],
)
def test_what_is_said_of_a_name_that_a_stage_does_not_have(stage: str, name: str, section: str, said: str) -> None:
    assert catalogue.find(name, section, stage) == said


@pytest.mark.parametrize("path", catalogue.settings())
def test_a_setting_is_explained_and_has_a_flag(path: str) -> None:
    setting = catalogue.settings()[path]
    assert setting.meaning.endswith((".", ")", "`")), f"{path} has no sentence under it"
    assert "<" not in expected(setting.kind) and "typing" not in expected(setting.kind)
    flag = catalogue.shortest_flag(path)
    assert catalogue.find(flag[2:]) is setting


def test_every_field_of_ppo_config_is_a_setting_or_is_left_out_by_name() -> None:
    names = {field.name for field in fields(PPOConfig)}
    settings = {setting.name for setting in catalogue.settings().values() if setting.section == "ppo"}
    assert settings | set(catalogue._NOT_SETTINGS) == names
    assert settings & set(catalogue._NOT_SETTINGS) == set()


@pytest.mark.parametrize("name", RENAMED)
def test_a_name_of_trl_1_is_a_setting(name: str) -> None:
    assert RENAMED[name][0] in catalogue.settings()
    found = catalogue.find(name)
    assert not isinstance(found, str) and found.path == RENAMED[name][0]


@pytest.mark.parametrize("name", sorted(set(EXPLAINED) - {"max_new_tokens"}))
def test_a_name_without_an_equivalent_says_what_to_use(name: str) -> None:
    found = catalogue.find(name)
    assert isinstance(found, str) and EXPLAINED[name][0].removeprefix("nothing: ") in found


@pytest.mark.parametrize(
    ("name", "section", "said"),
    [
        ("lerning_rate", "ppo", ": did you mean learning_rate?"),
        ("learning_rate", "train", ": use ppo.learning_rate"),
        ("lerning_rate", "train", ": did you mean learning_rate?"),
        ("steps", "ppo", ": use train.steps"),
        ("output_dir", "ppo", ": use train.run_dir"),
        ("temperature", "generation", ": use ppo.temperature: sampling and update share it"),
        ("logging_steps", "train", ", and needs none: every step is recorded"),
        ("xyzzyplugh", "ppo", ""),
    ],
)
def test_what_is_said_of_an_unknown_name(name: str, section: str, said: str) -> None:
    assert catalogue.find(name, section) == said
