"""`trl config init`, `check` and `diff`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl.cli import catalogue, launch, places, reward_sources, stage_templates
from trl.cli.arguments import Invocation
from trl.cli.catalogue import STAGES
from trl.cli.problems import Problem, UsageError, did_you_mean, shorten
from trl.cli.resolve import DEFAULT, Collector, Resolved, resolve
from trl.cli.run_table import existing_run
from trl.cli.yaml_nodes import Document
from trl.redaction import redact
from trl.trackers.plain import plain

TEMPLATE = """\
# trl ppo {name}           trl ppo {name} --dry-run prints every setting
model:
  name: tiny-gpt2-reviews        # a folder, a hub id, or this film-review model, which is in the package
  shared_layers: 2               # lowest layers that policy and reference share
data:
  prompts: review-openings       # or a .jsonl, .csv or .parquet file with a column prompt
  held_out: 64                   # prompts to evaluate on
reward: classifier:tiny-bert-sentiment    # or rewards.py:function, with def function(prompts, completions, **columns)
ppo:
  learning_rate: 3e-4            # 1e-5 for a model of 100 million parameters
  batch_size: 64                 # samples per step
  mini_batch_size: 16            # samples per optimizer step
  ppo_epochs: 2
  init_kl_coef: 0.05
  target: 13                     # KL to the reference, in nats per response
  horizon: 400
  temperature: 0.9
  score_clip: 3.5
  cliprange_value: 2.0
  vf_coef: 0.2
  max_grad_norm: 1.0
generation:
  max_new_tokens: 48
  batch_size: 64
train:
  steps: 40
  eval_every: 10
"""


def main(invocation: Invocation) -> int:
    """`trl config init | check | diff`."""
    action, *arguments = invocation.arguments
    actions = {"init": _init, "check": _check, "diff": _diff}
    if action not in actions:
        raise UsageError(f"{action} is none of {', '.join(actions)}{did_you_mean(action, actions)}")
    return actions[action](invocation, arguments)


def _init(invocation: Invocation, arguments: list[str]) -> int:
    command = arguments.pop(0) if arguments and arguments[0] in ("ppo", *STAGES) else "ppo"
    if len(arguments) > 1 or invocation.flags:
        near = did_you_mean(arguments[0], ("ppo", *STAGES)) if arguments else ""
        raise UsageError(f"trl config init takes a command, ppo by default, and one file name{near}")
    path = Path(arguments[0] if arguments else f"{'run' if command == 'ppo' else command}.yaml")
    texts = {path: TEMPLATE.format(name=path.name)}
    if command in STAGES:
        rows = path.with_suffix(".jsonl")
        texts = {
            path: stage_templates.template(command, path.name, str(rows)),
            rows: stage_templates.example_rows(command),
        }
    for target, text in texts.items():
        if target.exists() and not invocation.has("force"):
            raise UsageError(f"{target} exists: choose another name, or overwrite it with --force")
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError([Problem(text=error.strerror or str(error), where=str(target))]) from error
    print(f"wrote {' and '.join(map(str, texts))}\nnext: trl {command} {path}")
    return 0


def command_of(files: Sequence[str]) -> str:
    """The command of configurations: an offline stage if they have its section and none of PPO's, else "ppo"."""
    names: set[str] = set()
    for file in files:
        with suppress(UsageError):  # which is reported when the file is read
            names |= {key.value.strip().replace("-", "_") for key, _ in Document.load(file).pairs()}
    if names & {"ppo", "grpo", "reward", "generation"}:
        return "ppo"
    return next((stage for stage, section in STAGES.items() if section in names), "ppo")


def _check(invocation: Invocation, arguments: list[str]) -> int:
    if not arguments:
        raise UsageError("trl config check needs a file")
    command = command_of(arguments)
    resolved = resolve(command, files=arguments, environment=invocation.environment, flags=invocation.flags)
    places.check(resolved)
    if command not in STAGES:
        reward_sources.check(resolved)
    given = len(resolved.given)
    print(f"{', '.join(arguments)}: {given} settings given, all valid")
    return 0


def _diff(invocation: Invocation, arguments: list[str]) -> int:
    if len(arguments) != 2 or invocation.flags:
        raise UsageError("trl config diff needs two files or runs")
    left, right = (_values(name) for name in arguments)
    rows = [
        (path, _text(left.get(path)), _text(right.get(path)))
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]
    if not rows:
        print("no difference")
        return 0
    head = ("", *(shorten(name, 50) for name in arguments))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(3)]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1


def _values(name: str) -> dict[str, Any]:
    """Settings of a file or a run, by path, with secrets redacted."""
    if Path(name).is_file():
        command = command_of([name])
        collector = Collector(command)
        collector.add_file(name)
        return dict(redact(dict(collector.resolved(command).values)))
    run = existing_run(name)
    stored = launch.stored_config(run)
    if "launch" in stored:
        return dict(launch.Launch(run).resolved({}, ()).values)
    return dict(_flat(stored))  # of a run that Python started


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _flat(value, f"{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(resolved: Resolved) -> str:
    """The settings as YAML, each with where it came from; sections of defaults alone are left out."""
    lines = []
    for section in catalogue.sections_of(resolved.command):
        settings = [setting for setting in catalogue.settings(resolved.command).values() if setting.section == section]
        if all(resolved.sources[setting.path] == DEFAULT for setting in settings):
            continue
        lines.append(f"{section}:")
        for setting in settings:
            text = f"  {setting.name}: {_yaml(resolved[setting.path], setting.name)}"
            source = resolved.sources[setting.path]
            lines.append(f"{text:<60} # {source}" if len(text) <= 60 else f"{text}  # {source}")
    return "\n".join(shorten(line, 200) if len(line) > 200 else line for line in lines)


def _yaml(value: Any, name: str) -> str:
    import yaml

    redacted = plain({name: value})[name]
    return (
        yaml.safe_dump(redacted, default_flow_style=True, allow_unicode=True, width=10**9)
        .strip()
        .removesuffix("...")
        .strip()
    )


def _text(value: Any) -> str:
    return shorten(_yaml(value, "value"), 60)
