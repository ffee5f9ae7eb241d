"""The same job on this library and on its peers, in turn on the same machine: a table as JSON and Markdown.

    python scripts/fetch_assets.py
    python bench/compare.py --make-peers ~/peers --job main [--peers 0.11.4 1.16] [--rounds 2] [--out runs/bench]

`--make-peers DIR` builds a virtual environment per peer (needs pip and a package index). Every round runs each system once,
one after the other; the medians of all cycles but the first of each run are compared. The tables are written anew after every
run. What fails is a line of the table. Options that are not named here go to the job. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import roofline
from peers import PEERS, last_line, make_peer, old_format

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]  # what a run of a job printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A job under a name."""

    about: str
    options: tuple[str, ...] = ()
    settings: tuple[tuple[str, ...], ...] = ((),)  # further options; each is a group of the table
    peers: tuple[str, ...] = ("0.4.6", "0.11.4")  # those that can do it
    sampling: bool = False  # sample_job.py instead of job.py


GRPO = "1.16"
PRESETS = {
    "main": Preset(
        about="batch 16, mini-batch 4, 8 + 48 tokens, 4 epochs",
        options=("--batch", "16", "--mini", "4", "--new", "48", "--epochs", "4"),
        peers=("0.4.6", "0.11.4", GRPO),
    ),
    "long": Preset(
        about="as main, with 256 new tokens",
        options=("--batch", "16", "--mini", "4", "--new", "256", "--epochs", "4", "--cycles", "2"),
        peers=("0.4.6", "0.11.4", GRPO),
    ),
    "ragged64": Preset(
        about="batch 64, mini-batch 4, responses of 16 to 128 tokens, 4 epochs",
        options=("--batch", "64", "--mini", "4", "--new", "128", "--ragged", "16", "--epochs", "4", "--cycles", "2"),
    ),
    "lora": Preset(
        about="as main, a LoRA adapter of rank 16 on q_proj and v_proj",
        options=("--batch", "16", "--mini", "4", "--new", "48", "--epochs", "4", "--lora", "16"),
    ),
    "t5": Preset(
        about="as main, an encoder-decoder of 69M parameters with random weights",
        options=("--batch", "16", "--mini", "4", "--new", "48", "--epochs", "4", "--t5"),
    ),
    "sampling": Preset(
        about="sampling alone, 8 + 48 tokens",
        options=("--new", "48"),
        settings=(("--batch", "16"), ("--batch", "64")),
        peers=("generate", "vllm"),
        sampling=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A library in one precision: what to run."""

    name: str
    peer: str  # "" is this library
    script: str
    options: tuple[str, ...] = ()


def systems_of(preset: Preset, peers: Sequence[str]) -> list[System]:
    """This library first, which the others are compared with."""
    narrow, wide = ("--weights", "bfloat16"), ("--config", '{"dtype": "float32"}')
    usual, engine = ("sample_job.py", ("--engine", "ours")) if preset.sampling else ("job.py", ())
    found = [
        System(name="this library", peer="", script=usual, options=engine),
        System(name="this library, dtype=float32", peer="", script=usual, options=(*engine, *wide)),
    ]
    if not preset.sampling:
        narrow_moments = ("--config", '{"optimizer_state_dtype": "bfloat16"}')
        found.append(
            System(name="this library, optimizer_state_dtype=bfloat16", peer="", script=usual, options=narrow_moments)
        )
    for peer in peers:
        script = usual
        if preset.sampling:
            name = {"generate": "transformers generate", "vllm": "vLLM"}[peer]
            made = [(f"{name}, float32", ("--engine", peer)), (f"{name}, bfloat16", ("--engine", peer, *narrow))]
        elif peer == GRPO:
            script = "grpo_job.py"
            made = [(f"TRL {peer} GRPO, float32", ()), (f"TRL {peer} GRPO, bfloat16 autocast", ("--autocast",))]
        else:
            made = [(f"TRL {peer}, float32", ()), (f"TRL {peer}, bfloat16 weights", narrow)]
        found += [System(name=name, peer=peer, script=script, options=options) for name, options in made]
    return found


def last_error(text: str) -> str:
    """The line of a failed run's output that names the error: notes of a shutdown may follow it."""
    errors = [line.strip() for line in text.splitlines() if "Error" in line.split(":")[0] and not line.startswith(" ")]
    return (errors[-1] if errors else last_line(text))[:300]


def run(python: Path, script: str, options: Sequence[str], ours: bool, timeout: float) -> Rows:
    """The rows that a job printed.

    Raises:
        RuntimeError: with the error's last line, if the run failed or took too long.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if ours:
        environment["PYTHONPATH"] = str(HERE.parent)  # the tree that this script lies in, whatever is installed
    command = [str(python), str(HERE / script), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(last_error(done.stderr))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]  # not a peer's own dict


def summary(runs: list[Rows]) -> dict[str, Any]:
    """Medians over the cycles of all runs without the first of each, and the highest peak memory."""
    cycles = [row for rows in runs for row in rows if row.get("cycle", 0) > 0]
    keys = ("sample_s", "step_s", "forward_s", "optimize_s", "samples_per_s", "tokens_per_s")
    medians = {key: statistics.median(c[key] for c in cycles) for key in keys if all(key in c for c in cycles)}
    totals = [c["sample_s"] + c.get("step_s", 0.0) for c in cycles]
    return {
        **medians,
        "cycle_s": statistics.median(totals),
        "range_s": [min(totals), max(totals)],
        "peak_mb": max(rows[-1]["peak_mb"] for rows in runs),
        "cycles": len(cycles),
    }


def table(results: dict[str, list[Rows | str]], bounds: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """A line per system, and how many times faster this library is in its default and in float32.

    Args:
        results: by "group: system", the rows of each run or the error it ended with. The first system of a group is this
            library, the second the same in float32.
        bounds: by group, the least seconds of a cycle.
    """
    lines: list[dict[str, Any]] = []
    for name, runs in results.items():
        group, _, system = name.rpartition(": ")
        whole = [rows for rows in runs if not isinstance(rows, str) and any(row.get("cycle", 0) > 0 for row in rows)]
        line: dict[str, Any] = {"group": group, "system": system}
        if whole:
            line |= summary(whole)
        if errors := [rows for rows in runs if isinstance(rows, str)]:
            line["failed"] = errors[-1]
        elif not whole and runs:
            line["failed"] = "no cycle after the first one"
        lines.append(line)
    for group in dict.fromkeys(line["group"] for line in lines):
        members = [line for line in lines if line["group"] == group]
        for key, ours in zip(("ours_is", "ours_float32_is"), members, strict=False):
            for line in members:
                if "cycle_s" in ours and "cycle_s" in line:
                    line[key] = line["cycle_s"] / ours["cycle_s"]
        for line in members:
            if bounds and group in bounds and "cycle_s" in line:
                line["of_bound"] = line["cycle_s"] / bounds[group]
    return lines


# Heading, key of a line, format.
COLUMNS = (
    ("sampling, s", "sample_s", "{:.1f}"),
    ("`step`, s", "step_s", "{:.1f}"),
    ("scoring, s", "forward_s", "{:.1f}"),
    ("update, s", "optimize_s", "{:.1f}"),
    ("cycles, s", "range_s", "{0[0]:.1f} to {0[1]:.1f}"),
    ("samples/s", "samples_per_s", "{:.2f}"),
    ("tokens/s sampled", "tokens_per_s", "{:.0f}"),
    ("peak, MB", "peak_mb", "{:.0f}"),
    ("ours is", "ours_is", "{:.2f}×"),
    ("ours in float32 is", "ours_float32_is", "{:.2f}×"),
    ("times the bound", "of_bound", "{:.1f}"),
)


def markdown(lines: list[dict[str, Any]]) -> str:
    """The lines as a table; columns that nobody has are left out."""
    columns = [column for column in COLUMNS if any(column[1] in line for line in lines)]
    text = [
        "| " + " | ".join(["system", *(heading for heading, _, _ in columns)]) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for line in lines:
        name = f"{line['group']}: {line['system']}" if line["group"] else line["system"]
        cells = [form.format(line[key]) if key in line else "" for _, key, form in columns]
        if "failed" in line:
            name += f" (failed: {line['failed'].replace('|', '/')})"
        elif "cycles" not in line:
            name += " (not run yet)"
        text.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(text) + "\n"


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    import torch
    import transformers

    from trl.kernels.products import processor

    name = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line.partition(":") for line in info.read_text().splitlines()]
        about = {key.strip(): value.strip() for key, _, value in lines}
        parts = (about.get("model name", name), *(f"{k} {about[k]}" for k in ("cpu family", "model") if k in about))
        name = ", ".join(parts)
    able = [k for k, v in processor().items() if v is True and k in ("amx_bf16", "avx512_bf16")]
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bfloat16 instructions": able,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def bound_of(preset: Preset, options: Sequence[str], model: Path, ceilings: roofline.Ceilings) -> dict[str, Any]:
    """The least seconds of a cycle of the job with these options."""
    import job as jobs

    known = jobs.parse(["--model", str(model), "--reviews", "", *options])
    weights = roofline.weights_of(roofline.config_of(model, known.t5), known.lora, tuple(known.lora_targets))
    names = ("batch", "mini", "epochs", "query", "new", "ragged")
    found = roofline.bound(weights, roofline.Job.of(**{n: getattr(known, n) for n in names}), ceilings)
    return found | {"cycle_s": found["sample_s"] if preset.sampling else found["total_s"]}


def group_of(setting: tuple[str, ...]) -> str:
    """The name of a setting in the table."""
    return " ".join(setting).replace("--", "")


def compare(
    systems: list[System],
    settings: Sequence[tuple[str, ...]],
    rounds: int,
    start: Callable[[System, tuple[str, ...]], Rows],
    written: Callable[[dict[str, list[Rows | str]]], None],
) -> dict[str, list[Rows | str]]:
    """Runs every system once a round, one after the other, and hands on what there is after each run.

    A system that failed is not tried again.
    """
    places = [(setting, system) for setting in settings for system in systems]
    names = {place: f"{group_of(place[0])}: {place[1].name}" for place in places}
    results: dict[str, list[Rows | str]] = {names[place]: [] for place in places}
    for _ in range(rounds):
        for place in places:
            runs = results[names[place]]
            if any(isinstance(rows, str) for rows in runs):
                continue
            try:
                runs.append(start(place[1], place[0]))
            except RuntimeError as error:
                runs.append(str(error))
            print(names[place].removeprefix(": "), json.dumps(runs[-1]), flush=True)
            written(results)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="jobs: " + "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items()),
    )
    add = parser.add_argument
    add("--job", choices=sorted(PRESETS), default="main")
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    add("--reviews", type=Path, default=Path("data/reviews/train.jsonl"))
    add("--make-peers", type=Path, required=True, metavar="DIR")
    add("--peers", nargs="*", choices=sorted([*PEERS, "generate"]), help="all that can do the job unless given")
    add("--rounds", type=int, default=2)
    add("--timeout", type=float, default=3600, help="seconds of one run, after which it has failed")
    add("--out", type=Path, default=Path("runs/bench"))
    args, more = parser.parse_known_args(argv)
    preset = PRESETS[args.job]
    if args.peers and (unable := set(args.peers) - set(preset.peers)):
        parser.error(
            f"--job {args.job} has no part for {', '.join(sorted(unable))}: it takes {', '.join(preset.peers)}"
        )
    systems = systems_of(preset, preset.peers if args.peers is None else args.peers)
    options = [*preset.options, *more]
    pythons, obstacles = {"": Path(sys.executable), "generate": Path(sys.executable)}, {}
    for peer in {system.peer for system in systems} - set(pythons):
        try:
            pythons[peer] = make_peer(args.make_peers, peer)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            obstacles[peer] = f"no environment: {error}"
    old = ("0.4.6", "0.11.4")
    models = dict.fromkeys(old, old_format(args.model, args.make_peers / "model-transformers-4"))
    ceilings = [roofline.measure()]
    args.out.mkdir(parents=True, exist_ok=True)

    def start(system: System, setting: tuple[str, ...]) -> Rows:
        if system.peer in obstacles:
            raise RuntimeError(obstacles[system.peer])
        folders = ["--model", str(models.get(system.peer, args.model)), "--reviews", str(args.reviews)]
        command = [*folders, *system.options, *preset.options, *setting, *more]
        return run(pythons[system.peer], system.script, command, not system.peer, args.timeout)

    def write(results: dict[str, list[Rows | str]]) -> None:
        bounds = {
            group_of(setting): bound_of(preset, [*preset.options, *setting, *more], args.model, ceilings[0])
            for setting in preset.settings
        }
        lines = table(results, {name: found["cycle_s"] for name, found in bounds.items()})
        report = {
            "job": args.job, "about": preset.about, "options": options, "machine": machine(),
            "ceilings": asdict(ceilings[0]), "bounds": bounds, "rows": lines, "runs": results,
        }  # fmt: skip
        (args.out / f"{args.job}.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / f"{args.job}.md").write_text(markdown(lines))

    results = compare(systems, preset.settings, args.rounds, start, write)
    ceilings[0] = ceilings[0].best(roofline.measure())
    write(results)
    print((args.out / f"{args.job}.md").read_text())


if __name__ == "__main__":
    main()
