"""`trl ppo`, `trl grpo` and `trl resume`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import startup
from trl.cli import launch, places, reward_sources
from trl.cli.arguments import Invocation
from trl.cli.problems import UsageError
from trl.cli.resolve import Resolved, resolve
from trl.cli.run_table import existing_run, read_run
from trl.untrusted import visible

_INTERRUPTED = 130


def train(invocation: Invocation) -> int:
    """`trl ppo CONFIG.yaml ...`, and the other algorithms."""
    command = invocation.command.name
    resolved = resolve(command, files=invocation.arguments, environment=invocation.environment, flags=invocation.flags)
    places.check(resolved)
    files = reward_sources.check(resolved)
    default = Path(invocation.arguments[0]).stem if invocation.arguments else command
    free = not invocation.has("dry-run")
    resolved = places.with_run_folder(places.with_absolute_paths(resolved), default, free=free)
    if invocation.has("dry-run"):
        return _dry_run(command, resolved)
    return _run(command, resolved, launch.record(command, resolved, files), folder=None, resume=False)


def resume(invocation: Invocation) -> int:
    """`trl resume RUN`."""
    run = existing_run(invocation.arguments[0])
    started = launch.Launch(run)
    before = started.resolved({}, ())
    resolved = launch.Launch(run).resolved(invocation.environment, invocation.flags)
    moved = {"train.run_dir", "train.run_name", "train.root"} & {flag.setting.path for flag in invocation.flags}
    if moved:
        raise UsageError(f"{sorted(moved)[0]} cannot be changed: the run is the folder {places.shown_path(run)}")
    resolved = resolved.with_value("train.run_dir", str(run), resolved.sources["train.run_dir"])
    places.check(resolved)
    given_reward = any(flag.setting.path == "reward.functions" for flag in invocation.flags)
    if _saved_step(run) is None:
        _say(f"{places.shown_path(run)} has no checkpoint: it starts again, with the reward as it is now")
    else:
        started.check_files(resolved, given_reward)
    files = reward_sources.check(resolved)
    resolved = places.with_absolute_paths(resolved)
    for line in launch.changes(before.with_value("train.run_dir", str(run), ""), resolved):
        _say(f"changed: {line}")
    if invocation.has("dry-run"):
        return _dry_run(started.command, resolved)
    if _is_over(run, resolved):
        _say(f"{places.shown_path(run)} is finished: --steps with a higher number trains on")
        _say(_what_next(run))
        return 0
    kept = launch.record(started.command, resolved, files)
    kept["folder"] = started.folder
    return _run(started.command, resolved, kept, folder=started.folder, resume=True)


def _run(command: str, resolved: Resolved, kept: Mapping[str, Any], *, folder: str | None, resume: bool) -> int:
    run = Path(resolved["train.run_dir"])
    shown = places.shown_path(run)
    try:
        if (note := startup.busy_note()) is not None:
            _say(note)
        _say(f"loading {resolved['model.name']}")
        trainer, arguments = _prepare(command, resolved, folder)
        _say(f"{'going on with' if resume else 'training in'} {shown}; Ctrl-C saves and stops")
        result = trainer.train(**arguments, resume="auto" if resume else False, launch=kept)
    except KeyboardInterrupt:
        startup.end_on_next_interrupt()
        _say(_interrupted(run, shown))
        return _INTERRUPTED
    report = _write_report(run)
    if result.findings:
        _say(f"trl doctor {shown} shows what the doctor found, and what to change")
    _say(f"finished: {result.steps} steps, {result.episodes} samples in {_clock(result.seconds)}{_scores(run)}")
    _say(_what_next(run, report))
    return 0


def _prepare(command: str, resolved: Resolved, folder: str | None) -> tuple[Any, dict[str, Any]]:
    """The trainer and the arguments of its run."""
    from trl.cli import building
    from trl.runs.options import TrainOptions

    building.quiet()
    train = resolved.section("train")
    prompts, eval_prompts = building.prompts(resolved)
    arguments: dict[str, Any] = {
        name: getattr(train, name)
        for name in (
            "steps", "episodes", "run_dir", "eval_every", "save_every", "keep_last", "keep_best", "on_spike",
            "max_skipped_updates", "on_disk_error", "progress",
        )
    }  # fmt: skip
    arguments |= {
        "prompts": prompts,
        "eval_prompts": eval_prompts,
        "generation": building.generation(resolved),
        "reward": reward_sources.build(resolved, folder),
    }
    try:
        options = TrainOptions(**arguments)
    except ValueError as error:
        raise UsageError([resolved.problem(str(error))]) from error
    steps = options.target(int(resolved["ppo.batch_size"]) * int(os.environ.get("WORLD_SIZE", "1")))
    return building.trainer(command, resolved, steps), arguments | {"doctor": train.doctor}


def _dry_run(command: str, resolved: Resolved) -> int:
    from trl.cli import configs, estimate

    print(configs.shown(resolved))
    print()
    print(estimate.text(command, resolved))
    return 0


def _is_over(run: Path, resolved: Resolved) -> bool:
    """Whether a run has finished and is not asked for more steps."""
    summary = _read_json(run / "summary.json")
    if summary.get("reason") != "steps" or not (run / "model").is_dir():
        return False
    steps = resolved["train.steps"]
    episodes = resolved["train.episodes"]
    done = summary.get("steps", 0) if episodes is None else summary.get("episodes", 0)
    return bool((episodes if steps is None else steps) <= done)


def _interrupted(run: Path, shown: str) -> str:
    saved = _saved_step(run)
    if saved is None:
        started = (run / "events.log").exists()
        return "stopped before the first checkpoint: nothing is saved" + (
            f"; trl resume {shown} starts again" if started else ""
        )
    return f"saved step {saved}; run `trl resume {shown}` to go on"


def _saved_step(run: Path) -> int | None:
    """Step of the newest checkpoint."""
    step = _read_json(run / "checkpoints" / "latest.json").get("step")
    return step if isinstance(step, int) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _scores(run: Path) -> str:
    """First and last mean score: on held-out prompts if they were evaluated twice, else of the batches."""
    from trl.trackers import read_metrics

    rows = read_metrics(run)
    for key, where in (("eval/score_mean", " on held-out prompts"), ("score/mean", "")):
        scores = [row[key] for row in rows if row.get(key) is not None]
        if len(scores) > 1:
            return f"; mean score{where} {scores[0]:.3f} -> {scores[-1]:.3f}"
    return ""


def _write_report(run: Path) -> Path | None:
    """Writes the run's report; a run that has finished does not fail over it."""
    from trl.report import write_report

    try:
        return write_report([run])
    except (OSError, ValueError, ImportError) as error:
        _say(f"warning: the report could not be written: {error}")
        return None


def _what_next(run: Path, report: Path | None = None) -> str:
    shown = places.shown_path(run)
    row = read_run(run)
    lines = [f"  model    {places.shown_path(Path(row.model))}" if row.model else "  model    none yet"]
    if report is not None:
        lines.append(f"  report   {places.shown_path(report)}")
    lines += [f"  summary  {places.shown_path(run / 'summary.json')}", "next:"]
    lines += [
        f"  trl report {shown} --open",
        f"  trl eval {shown}",
        f"  trl generate {shown} --prompt TEXT",
    ]
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    from trl.runs.progress import clock

    return clock(seconds)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(visible(text) + "\n")
