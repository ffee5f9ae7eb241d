"""`trl ppo`, `trl grpo`, the offline stages `trl sft`, `reward`, `dpo` and `kto`, and `trl resume`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import startup
from trl.cli import launch, places, reward_sources, stages
from trl.cli.arguments import Invocation
from trl.cli.catalogue import STAGES
from trl.cli.problems import UsageError
from trl.cli.resolve import Resolved, resolve
from trl.cli.run_table import existing_run, read_run
from trl.untrusted import visible

_INTERRUPTED = 130
_OUTCOMES = {
    "eval/score_mean": "mean score on held-out prompts",
    "score/mean": "mean score",
    "eval_loss": "loss on held-out rows",
    "loss": "loss",
}

_BEFORE = {"eval/score_mean": "eval_before/score_mean"}  # before the first step


def train(invocation: Invocation) -> int:
    """`trl ppo CONFIG.yaml ...`, and the other algorithms."""
    command = invocation.command.name
    resolved = resolve(command, files=invocation.arguments, environment=invocation.environment, flags=invocation.flags)
    places.check(resolved)
    files = _files(resolved)
    default = Path(invocation.arguments[0]).stem if invocation.arguments else command
    free = not invocation.has("dry-run")
    resolved = places.with_run_folder(places.with_absolute_paths(resolved), default, free=free)
    if command in STAGES:
        resolved = stages.with_evaluation(resolved)
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
    given_anew = any(flag.setting.path in ("reward.functions", "data.dataset") for flag in invocation.flags)
    if _saved_step(run) is None:
        files_of = "rows" if started.command in STAGES else "reward"
        _say(f"{places.shown_path(run)} has no checkpoint: it starts again, with the {files_of} as it is now")
    else:
        started.check_files(resolved, given_anew)
    files = _files(resolved)
    resolved = places.with_absolute_paths(resolved)
    changes = launch.changes(before.with_value("train.run_dir", str(run), ""), resolved)
    for line in changes:
        _say(f"changed: {line}")
    if invocation.has("dry-run"):
        return _dry_run(started.command, resolved)
    stage = started.command in STAGES
    if _has_ended(run) and (not changes if stage else _has_all_steps(run, resolved)):
        longer = "--max-steps or --num-train-epochs" if stage else "--steps"
        _say(f"{places.shown_path(run)} is finished: {longer} with a higher number trains on")
        _say(_what_next(run))
        return 0
    kept = launch.record(started.command, resolved, files)
    kept["folder"] = started.folder
    return _run(started.command, resolved, kept, folder=started.folder, resume=True)


def _run(command: str, resolved: Resolved, kept: Mapping[str, Any], *, folder: str | None, resume: bool) -> int:
    run = Path(resolved["train.run_dir"])
    shown, done = places.shown_path(run), (_saved_step(run) or 0) if resume else 0
    try:
        if (note := startup.busy_note()) is not None:
            _say(note)
        _say(f"loading {resolved['model.name']}")
        prepare = stages.prepare if command in STAGES else _prepare
        trainer, arguments = prepare(command, resolved, folder)
        _say(f"{'going on with' if resume else 'training in'} {shown}; Ctrl-C saves and stops")
        again = "resume_from_checkpoint" if command in STAGES else "resume"
        result = trainer.train(**arguments, **{again: "auto" if resume else False}, launch=kept)
    except KeyboardInterrupt:
        startup.end_on_next_interrupt()
        _say(_interrupted(run, shown))
        return _INTERRUPTED
    report = _write_report(run)
    if command in STAGES:
        seconds = _read_json(run / "summary.json").get("time/seconds", 0.0)
        _say(f"finished: {result.global_step} steps{_took(result.global_step, done, seconds)}{_scores(run)}")
    else:
        if result.findings:
            _say(f"trl doctor {shown} shows what the doctor found, and what to change")
        took = _took(result.steps, done, result.seconds)
        _say(f"finished: {result.steps} steps, {result.episodes} samples{took}{_scores(run)}")
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
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # beside a reward's file, which it imports
    try:
        print(stages.estimate(resolved) if command in STAGES else estimate.text(command, resolved))
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return 0


def _files(resolved: Resolved) -> dict[str, str]:
    """SHA-256 of the files that a resumed run must find unchanged, by path."""
    return places.file_digests(resolved) if resolved.command in STAGES else reward_sources.check(resolved)


def _has_ended(run: Path) -> bool:
    return _read_json(run / "summary.json").get("reason") == "steps" and (run / "model").is_dir()


def _has_all_steps(run: Path, resolved: Resolved) -> bool:
    """Whether a run has all the steps that it is asked for."""
    summary = _read_json(run / "summary.json")
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


def _took(steps: int, before: int, seconds: float) -> str:
    """How long the steps of this process took, after those that an earlier one had done."""
    which = f"; the last {steps - before}" if 0 < before < steps else ""
    return f"{which} in {_clock(seconds)}"


def _scores(run: Path) -> str:
    """First and last mean score or loss: on held-out data if they were evaluated twice, else of the batches."""
    from trl.trackers import read_metrics

    rows = read_metrics(run)
    for key, what in _OUTCOMES.items():
        before = [rows[0].get(_BEFORE.get(key, ""))] if rows else []
        scores = [value for value in (*before, *(row.get(key) for row in rows)) if value is not None]
        if len(scores) > 1:
            return f"; {what} {scores[0]:.3f} -> {scores[-1]:.3f}"
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
    lines.append(f"  trl report {shown} --open")
    if row.algorithm in STAGES:
        lines += [f"  {line}" for line in stages.next_commands(row.algorithm, shown)]
    else:
        lines += [f"  trl eval {shown}", f"  trl generate {shown} --prompt TEXT"]
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    from trl.runs.progress import clock

    return clock(seconds)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(visible(text) + "\n")
