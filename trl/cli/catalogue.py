"""Every setting of the command line: its name, type, default and meaning, read from the dataclasses of the sections."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.cli import sections
from trl.cli.problems import did_you_mean
from trl.trainer.ppo_config import PPOConfig
from trl.trainer.setting_names import EXPLAINED, RENAMED, instead

STAGES: Mapping[str, str] = {"sft": "sft", "reward": "reward_model", "dpo": "dpo", "kto": "kto"}
"""The section of each offline stage's settings, by the stage's command."""

# Modules that hold a stage's settings, its own class first. Imported when they are needed, since they import torch.
_STAGE_MODULES = {
    "sft": ("sft_config", "stage_config"),
    "reward": ("reward_config", "preference_config", "stage_config"),
    "dpo": ("dpo_config", "referenced_config", "preference_config", "stage_config"),
    "kto": ("kto_config", "referenced_config", "preference_config", "stage_config"),
}
_STAGE_CLASSES = {"sft": "SFTConfig", "reward": "RewardConfig", "dpo": "DPOConfig", "kto": "KTOConfig"}
_SHARED: Mapping[str, type] = {"model": sections.ModelSettings, "lora": sections.LoraSettings}
_ONLINE: Mapping[str, type] = {
    **_SHARED,
    "data": sections.DataSettings,
    "reward": sections.RewardSettings,
    "ppo": PPOConfig,
    "grpo": sections.GRPOSettings,
    "generation": sections.GenerationSettings,
    "train": sections.TrainSettings,
}
SECTIONS: tuple[str, ...] = (*_ONLINE, *STAGES.values())
"""Every section of a configuration; a command reads some of them."""
SHORTHAND = {"model": "model.name", "data": "data.prompts", "reward": "reward.functions"}
"""The setting that a section's plain value stands for: `model: gpt2` sets `model.name`. See `shorthand`."""

# Fields of PPOConfig that name things for a script, that the trainer writes, or that are old names of others.
_NOT_SETTINGS = (
    "steps", "model_name", "forward_batch_size", "exp_name", "query_dataset", "reward_model", "dataset_num_proc",
    "optimize_device_cache", "backward_batch_size", "world_size", "global_batch_size", "global_backward_batch_size",
    "is_encoder_decoder", "is_peft_model",
)  # fmt: skip
# Fields of the stages' classes that a run sets itself, that are for scripts, or that a run directory does not support.
NOT_STAGE_SETTINGS = (
    "output_dir", "run_name", "disable_tqdm", "trust_remote_code", "do_train", "do_eval", "do_predict",
    "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "save_only_model", "enable_jit_checkpoint",
    "local_rank", "log_on_each_node", "log_level", "log_level_replica", "save_on_each_node", "label_names",
    "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "dataset_kwargs",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "fsdp", "fsdp_config", "deepspeed", "parallelism_config", "debug", "trackio_static_space_id",
    "ref_model_init_kwargs",
)  # fmt: skip
_SHORT_HELP = 140  # characters of a setting's help that is shown in full
# Of the shared sections, what an offline stage reads.
_STAGE_TRAIN = ("run_dir", "run_name", "root", "progress")
_FLAGS = {"model": "model.name", "reward": "reward.functions"}
_HINTS = {
    "ppo.steps": "train.steps",
    "ppo.model_name": "model.name",
    "ppo.reward_model": "reward.functions",
    "ppo.query_dataset": "data.prompts",
    "generation.temperature": "ppo.temperature: sampling and update share it",
    "clip_range": "ppo.cliprange, or grpo.clip_range for GRPO",
}
# Names of settings of other commands, or of a script, and those of an offline stage that take their place.
_STAGE_NAMES = {
    "steps": "max_steps", "eval_every": "eval_steps", "save_every": "save_steps", "keep_last": "save_total_limit",
    "schedule": "lr_scheduler_type", "warmup_steps": "warmup_steps", "keep_best": "load_best_model_at_end",
}  # fmt: skip
_STAGE_HINTS = {
    "output_dir": "train.run_dir", "prompts": "data.dataset", "eval_prompts": "data.eval_dataset",
    "dataset_name": "data.dataset", "trust_remote_code": "model.trust_remote_code",
    "hub_model_id": "trainer.push_to_hub in Python", "push_to_hub": "trainer.push_to_hub in Python",
    "use_peft": "lora.r, the rank of the adapter",
}  # fmt: skip


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


def family(command: str) -> str:
    """The command whose settings a command takes: an offline stage its own, any other those of "ppo"."""
    return command if command in STAGES else "ppo"


def owner(section: str, command: str) -> str:
    """A family that reads a section: that of `command` if it does."""
    if section in sections_of(command):
        return family(command)
    return next((stage for stage, name in STAGES.items() if name == section), "ppo")


def sections_of(command: str = "ppo") -> tuple[str, ...]:
    """The sections that a command reads."""
    stage = STAGES.get(command)
    return tuple(_ONLINE) if stage is None else (*_SHARED, "data", stage, "train")


def section_class(section: str, command: str = "ppo") -> Any:
    """The dataclass of a section of a command."""
    if family(command) == "ppo" or section in ("model", "lora", "train"):
        return _ONLINE[section]
    if section == "data":
        return sections.RowSettings
    module = importlib.import_module(f"trl.trainer.offline.{_STAGE_MODULES[command][0]}")
    return getattr(module, _STAGE_CLASSES[command])


def shorthand(section: str, command: str = "ppo") -> str:
    """The setting that a section's plain value stands for."""
    return "data.dataset" if section == "data" and command in STAGES else SHORTHAND[section]


def settings(command: str = "ppo") -> dict[str, Setting]:
    """All settings of a command by path, in the order of the sections."""
    return _settings(family(command))


@functools.cache
def _settings(command: str) -> dict[str, Setting]:
    found = {}
    for section in sections_of(command):
        cls = section_class(section, command)
        kinds = typing.get_type_hints(cls)
        meanings = _helped(cls) if section == STAGES.get(command) else documented(cls)
        for field in dataclasses.fields(cls):
            if not _is_setting(section, field.name, command):
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            path = f"{section}.{field.name}"
            found[path] = Setting(
                path=path, kind=kinds[field.name], default=default, meaning=meanings.get(field.name, "")
            )
    return found


def _is_setting(section: str, name: str, command: str) -> bool:
    if section == "ppo":
        return name not in _NOT_SETTINGS
    if command not in STAGES:
        return True
    if section == STAGES[command]:
        return name not in NOT_STAGE_SETTINGS
    if section == "model":
        return name != "shared_layers" and (name != "reference" or command in ("dpo", "kto"))
    return section != "train" or name in _STAGE_TRAIN


def _helped(cls: Any) -> dict[str, str]:
    """Each field's help, as transformers' classes hold it; the first sentence if it is long."""
    found = {}
    for field in dataclasses.fields(cls):
        text = " ".join(str(field.metadata.get("help") or "").replace("%%", "%").split())
        sentence = text if len(text) <= _SHORT_HELP else re.split(r"(?<=[a-z\d`)'\]])\. (?=[A-Z])", text, maxsplit=1)[0]
        found[field.name] = f"{sentence.rstrip('.')}." if sentence else ""
    return found


def setting_names(command: str) -> list[str]:
    """Paths of a command's settings; an offline stage's are parsed from source, without importing torch."""
    if command not in STAGES:
        return list(settings(command))
    found = importlib.util.find_spec("transformers")
    places = [Path(__file__).parents[1] / "trainer" / "offline" / f"{name}.py" for name in _STAGE_MODULES[command]]
    places += [Path(root) / "training_args.py" for root in (found and found.submodule_search_locations) or ()]
    names: dict[str, None] = {}
    for place in places:
        text = place.read_text(encoding="utf-8")
        names |= dict.fromkeys(re.findall(r"^    (\w+): (?!ClassVar).*= *(?:field\(|_?\w+\()", text, re.MULTILINE))
    paths = [f"{STAGES[command]}.{name}" for name in names if _is_setting(STAGES[command], name, command)]
    others = (section for section in sections_of(command) if section != STAGES[command])
    for section in others:
        fields = dataclasses.fields(section_class(section, command))
        paths += [f"{section}.{field.name}" for field in fields if _is_setting(section, field.name, command)]
    return paths


def flags(command: str = "ppo") -> dict[str, str]:
    """Path of the setting of every flag, by the flag's name with `_` for `-`: short ones, long ones and TRL's names."""
    return _flags(family(command))


@functools.cache
def _flags(command: str) -> dict[str, str]:
    paths = list(settings(command))
    names = _short_flags(command, paths)
    for name, (path, _) in RENAMED.items():
        if path in settings(command):
            names.setdefault(name, path)
    for section in SHORTHAND:
        if section in sections_of(command):
            names.setdefault(section, shorthand(section, command))
    return names | {path: path for path in paths}


def _short_flags(command: str, paths: Sequence[str]) -> dict[str, str]:
    """Names without their section; of two of one name, the first section's counts."""
    names = {name: path for name, path in _FLAGS.items() if path in paths}
    for section in (STAGES.get(command, "ppo"), "train", "data", "generation"):
        for path in paths:
            owner_section, _, name = path.partition(".")
            if owner_section == section:
                names.setdefault(name, path)
    return names


def shortest_flags(command: str = "ppo") -> dict[str, str]:
    """Flag shown for each setting, by path: `--learning-rate`, or `--lora.r`. Does not import torch."""
    paths = setting_names(command)
    short: dict[str, str] = {}
    for name, path in _short_flags(family(command), paths).items():
        short.setdefault(path, name)
    return {path: "--" + short.get(path, path).replace("_", "-") for path in paths}


def shortest_flag(path: str, command: str = "ppo") -> str:
    """The flag of one setting."""
    return shortest_flags(command)[path]


def find(name: str, section: str | None = None, command: str = "ppo") -> Setting | str:
    """The setting that a name means.

    Args:
        name: name of a setting here or in TRL 1, with or without its section.
        section: the section that the name was given in; None if none.
        command: the command that it was given to.

    Returns:
        The setting, or the reason for the error: the end of a sentence that begins "... is no setting".
    """
    name = name.strip().replace("-", "_")
    known, names = settings(command), flags(command)
    path = name if section is None else f"{section}.{name}"
    if path in known:
        return known[path]
    if section is None and name in names:
        return known[names[name]]
    target = RENAMED[name][0] if name in RENAMED and RENAMED[name][0] in known else names.get(name)
    if section is not None and target is not None and target.partition(".")[0] == section and name in RENAMED:
        return known[target]
    if command in STAGES:
        last = path.rpartition(".")[2]
        hint = f"{STAGES[command]}.{_STAGE_NAMES[last]}" if last in _STAGE_NAMES else _STAGE_HINTS.get(last)
        if hint is not None and path != hint:
            return f": use {hint}"
    elif path in _HINTS:
        return f": use {_HINTS[path]}"
    elif name in EXPLAINED:
        return instead(EXPLAINED[name][0])
    if target is not None:
        return f": use {target}"
    if section is None:
        elsewhere = [setting.path for setting in known.values() if setting.name == name]
        return f": use {elsewhere[0]}" if elsewhere else did_you_mean(name, [*names, *sections_of(command)])
    here = [setting.name for setting in known.values() if setting.section == section]
    return did_you_mean(name, here) or did_you_mean(name, [s.name for s in known.values()])


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
