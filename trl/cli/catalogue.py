"""Every setting of the command line: its name, type, default and meaning, read from the dataclasses of the sections."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl.cli import sections
from trl.cli.problems import did_you_mean
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.setting_names import EXPLAINED, RENAMED, instead

SECTIONS: Mapping[str, type] = {
    "model": sections.ModelSettings,
    "lora": sections.LoraSettings,
    "data": sections.DataSettings,
    "reward": sections.RewardSettings,
    "ppo": PPOConfig,
    "grpo": sections.GRPOSettings,
    "generation": sections.GenerationSettings,
    "train": sections.TrainSettings,
}
SHORTHAND = {"model": "model.name", "data": "data.prompts", "reward": "reward.functions"}
"""The setting that a section's plain value stands for: `model: gpt2` sets `model.name`."""

# Fields of PPOConfig that name things for a script, that the trainer writes, or that are old names of others.
_NOT_SETTINGS = (
    "steps", "model_name", "forward_batch_size", "exp_name", "query_dataset", "reward_model", "dataset_num_proc",
    "optimize_device_cache", "backward_batch_size", "world_size", "global_batch_size", "global_backward_batch_size",
    "is_encoder_decoder", "is_peft_model",
)  # fmt: skip
# Sections whose settings have a flag without the section's name; of two of one name, the first.
_SHORT = ("ppo", "train", "data", "generation")
_FLAGS = {"model": "model.name", "reward": "reward.functions"}
_HINTS = {
    "ppo.steps": "train.steps",
    "ppo.model_name": "model.name",
    "ppo.reward_model": "reward.functions",
    "ppo.query_dataset": "data.prompts",
    "generation.temperature": "ppo.temperature: sampling and update share it",
    "clip_range": "ppo.cliprange, or grpo.clip_range for GRPO",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting."""

    path: str  # "ppo.learning_rate"
    kind: Any  # its type
    default: Any
    meaning: str

    @property
    def section(self) -> str:
        """Section, such as "ppo"."""
        return self.path.partition(".")[0]

    @property
    def name(self) -> str:
        """Name in its section, such as "learning_rate"."""
        return self.path.partition(".")[2]


@functools.cache
def settings() -> dict[str, Setting]:
    """All settings by path, in the order of the sections."""
    found = {}
    for section, cls in SECTIONS.items():
        kinds, meanings = typing.get_type_hints(cls), documented(cls)
        for field in dataclasses.fields(cls):
            if section == "ppo" and field.name in _NOT_SETTINGS:
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            path = f"{section}.{field.name}"
            found[path] = Setting(
                path=path, kind=kinds[field.name], default=default, meaning=meanings.get(field.name, "")
            )
    return found


@functools.cache
def flags() -> dict[str, str]:
    """Path of the setting of every flag, by the flag's name with `_` for `-`: short ones, long ones and TRL's names."""
    names = dict(_FLAGS)
    for section in _SHORT:
        for path, setting in settings().items():
            if setting.section == section:
                names.setdefault(setting.name, path)
    for name, (path, _) in RENAMED.items():
        names.setdefault(name, path)
    for section, path in SHORTHAND.items():
        names.setdefault(section, path)
    return names | {path: path for path in settings()}


def shortest_flag(path: str) -> str:
    """The flag that help and messages show: `--learning-rate`, or `--lora.r`."""
    name = next((name for name, target in flags().items() if target == path and name not in RENAMED), path)
    return "--" + name.replace("_", "-")


def find(name: str, section: str | None = None) -> Setting | str:
    """The setting that a name means.

    Args:
        name: name of a setting here or in TRL 1, with or without its section.
        section: the section that the name was given in; None if none.

    Returns:
        The setting, or the reason for the error: the end of a sentence that begins "... is no setting".
    """
    name = name.strip().replace("-", "_")
    path = name if section is None else f"{section}.{name}"
    if path in settings():
        return settings()[path]
    if section is None and name in flags():
        return settings()[flags()[name]]
    target = RENAMED[name][0] if name in RENAMED else flags().get(name)
    if section is not None and target is not None and target.partition(".")[0] == section and name in RENAMED:
        return settings()[target]
    if path in _HINTS:
        return f": use {_HINTS[path]}"
    if name in EXPLAINED:
        return instead(EXPLAINED[name][0])
    if target is not None:
        return f": use {target}"
    if section is None:
        elsewhere = [setting.path for setting in settings().values() if setting.name == name]
        return f": use {elsewhere[0]}" if elsewhere else did_you_mean(name, [*flags(), *SECTIONS])
    known = [setting.name for setting in settings().values() if setting.section == section]
    return did_you_mean(name, known) or did_you_mean(name, [s.name for s in settings().values()])


def documented(cls: type) -> dict[str, str]:
    """The sentences under the fields of a dataclass, by the field's name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found, name = {}, None
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif name is not None and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[name] = " ".join(str(node.value.value).split())
            name = None
        else:
            name = None
    return found
