"""Writes the parts of the pages that follow from the code: every setting, and every metric with its healthy band.

python scripts/docs_tables.py            # docs/reference/settings.md, docs/start/reading-the-report.md
python scripts/docs_tables.py --check    # exit code 1 if a page is out of date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GROUPS: dict[str, tuple[str, ...]] = {
    "Batches and passes": (
        "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "group_size", "loss_denominator",
        "seed",
    ),
    "Optimiser": ("learning_rate", "max_grad_norm", "max_skipped_updates", "value_warmup_steps"),
    "PPO": (
        "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "dual_clip", "early_stopping", "target_kl",
        "ratio_threshold", "importance_cap",
    ),
    "KL penalty": ("init_kl_coef", "adap_kl_ctrl", "target", "horizon", "kl_penalty"),
    "Scores and rewards": (
        "use_score_scaling", "use_score_norm", "score_clip", "whiten_rewards", "missing_eos_penalty",
    ),
    "Sampling": ("temperature", "stop_token_ids"),
    "Precision, memory and speed": (
        "dtype", "optimizer_state_dtype", "gradient_checkpointing", "score_while_sampling", "keep_memory",
        "optimize_cuda_cache", "optimize_device_cache", "accelerator_kwargs",
    ),
    "Data, trackers and hub": (
        "remove_unused_columns", "log_with", "tracker_project_name", "tracker_kwargs", "project_kwargs",
        "push_to_hub_if_best_kwargs", "compare_steps",
    ),
    "Names for your own script": (
        "steps", "task_name", "model_name", "exp_name", "query_dataset", "reward_model", "dataset_num_proc",
    ),
    "Old names, and values that the trainer writes": (
        "forward_batch_size", "backward_batch_size", "world_size", "global_batch_size", "global_backward_batch_size",
        "is_encoder_decoder", "is_peft_model",
    ),
}  # fmt: skip


def sentences(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass."""
    (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value!r}`"


def accepted(cls: type, field: dataclasses.Field[Any]) -> str:
    """The range of a setting: what its error message asks for, else its type."""
    for wrong in ("?", -1.5):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old names and settings of other releases
                cls(**{field.name: wrong})
        except (ValueError, TypeError) as error:
            if found := re.search(rf"{field.name}=\S+ must be (?:one of )?(.*)", str(error)):
                text = found[1].removesuffix(" for early_stopping").replace(" to inf", " up")
                return text.replace("a number from 0 up", "a number of at least 0")
    names = {"str": "text", "int": "a whole number", "float": "a number", "bool": "`True` or `False`"}
    kind = str(field.type).replace("dict[str, Any]", "a dictionary").replace("Sequence[int]", "a list of token ids")
    return " or ".join(names.get(part.strip(), part.strip()) for part in kind.split("|"))


def row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def settings_table(cls: type, names: Sequence[str]) -> list[str]:
    fields, said = {f.name: f for f in dataclasses.fields(cls)}, sentences(cls)
    lines = ["| setting | default | accepts | |", "| --- | --- | --- | --- |"]
    return lines + [
        row((f"`{name}`", default(fields[name]), accepted(cls, fields[name]), said.get(name, ""))) for name in names
    ]


def arguments(function: Any) -> dict[str, str]:
    """Descriptions of a function's arguments, from its docstring."""
    text = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2]
    block = re.split(r"\n(?=\S)", text)[0]
    found: dict[str, str] = {}
    for line in block.splitlines():
        if start := re.match(r"    (\w+): (.*)", line):
            found[name := start[1]] = start[2]
        elif found and line.strip():
            found[name] += " " + line.strip()
    return found


def file_sections() -> dict[str, type]:
    """Sections of a configuration file by name, except `ppo`."""
    from trl.cli.catalogue import section_class, sections_of

    return {name: section_class(name) for name in sections_of() if name != "ppo"}


def settings_page() -> str:
    """docs/reference/settings.md."""
    from trl import PPOConfig, PPOTrainer, SpikeSettings

    listed = [name for names in GROUPS.values() for name in names]
    fields = [field.name for field in dataclasses.fields(PPOConfig)]
    assert sorted(listed) == sorted(fields), f"GROUPS: {set(listed) ^ set(fields)}"
    lines = [
        "<!-- Written by scripts/docs_tables.py: `make docs-tables`. -->",
        "# Settings",
        "",
        "Every setting of `PPOConfig`, every argument of `train`, with default and range. A value out of range is a `ValueError`",
        "that names the setting; a name that does not exist is a `TypeError` that suggests the nearest one.",
        "[Choosing settings](../start/choosing-settings.md) says which of them to set.",
        "",
        "## PPOConfig",
        "",
    ]
    for group, names in GROUPS.items():
        lines += [f"### {group}", "", *settings_table(PPOConfig, names), ""]
    lines += ["## Arguments of train", "", "`PPOTrainer.train(prompts, reward=..., ...)`:", ""]
    lines += ["| argument | default | |", "| --- | --- | --- |"]
    parameters, said = inspect.signature(PPOTrainer.train).parameters, arguments(PPOTrainer.train)
    for name, parameter in list(parameters.items())[1:]:
        value = "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        lines.append(row((f"`{name}`", value, said[name])))
    lines += ["", "## SpikeSettings", "", "`train(spike=SpikeSettings(...))`:", ""]
    lines += settings_table(SpikeSettings, [field.name for field in dataclasses.fields(SpikeSettings)])
    lines += [
        "",
        "## Sections of a configuration file",
        "",
        "What `trl ppo run.yaml` reads beside `ppo:`, which holds the settings of `PPOConfig`, and `train:`, which holds arguments of",
        "`train` ([the command line](../how-to/command-line.md)).",
    ]
    for section, cls in file_sections().items():
        said, fields = sentences(cls), dataclasses.fields(cls)
        rows = [row((f"`{section}.{field.name}`", default(field), said.get(field.name, ""))) for field in fields]
        lines += ["", f"### {section}", "", "| setting | default | |", "| --- | --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def band(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "none"
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def metrics_section() -> str:
    """The catalogue of metrics, for docs/start/reading-the-report.md."""
    from trl.health import METRICS, bands

    config = {"ppo": {"target": 6, "adap_kl_ctrl": True, "cliprange": 0.2, "target_kl": 0.1, "max_grad_norm": 1.0}}
    resolved = bands(config)
    parts = ["| metric | unit | what it is | healthy |", "| --- | --- | --- | --- |"]
    for key, metric in METRICS.items():
        healthy = resolved.get(key)
        shown = band(healthy.low, healthy.high) if healthy else "read its trend"
        parts.append(row((f"`{key}`", metric.unit, metric.meaning, shown)))
    parts += ["", "### Symptom, cause, change", ""]
    for key, metric in METRICS.items():
        for side, symptom in (("too low", metric.too_low), ("too high", metric.too_high)):
            if symptom is not None:
                parts += [
                    f"#### {metric.title}: {side}",
                    "",
                    f"`{key}`. {symptom.symptom}",
                    "",
                    f"- **Likely cause.** {symptom.cause}",
                    f"- **Change.** {symptom.change}",
                    "",
                ]
    return "\n".join(parts).rstrip()


def with_block(text: str, name: str, block: str) -> str:
    """`text` with what is between the markers of `name` replaced."""
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    assert re.search(pattern, text, re.DOTALL), f"no markers of {name}"
    return re.sub(pattern, lambda found: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL)


def pages() -> Mapping[Path, str]:
    """Contents of every page that is written here, wholly or in part."""
    report = ROOT / "docs/start/reading-the-report.md"
    return {
        ROOT / "docs/reference/settings.md": settings_page(),
        report: with_block(report.read_text(encoding="utf-8"), "metrics", metrics_section()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path.relative_to(ROOT)} is out of date: run scripts/docs_tables.py", file=sys.stderr)
        else:
            path.write_text(pages()[path], encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    sys.exit(bool(stale) if args.check else 0)


if __name__ == "__main__":
    main()
