"""Seconds until the demo's policy is good, on this library and on others: JSON, Markdown, and a figure where matplotlib is.

    python bench/time_to_quality.py --peer "TRL 0.11.4=PYTHON" --seeds 3 --out runs/quality

Good: the mean P(POSITIVE) of a batch is above 0.9, and so is that of every one of the 4 batches after it. The time is that
at which the first of the five had been sampled and scored, from the end of loading. All systems take the same prompts in the
same order, the same classifier code and the same settings where they know them (bench/quality_job.py); they run in turn,
seed by seed. `--peer NAME=PYTHON` is another library's interpreter (bench/compare.py --make-peers makes one), `--ours NAME=JSON`
this one with other settings. Nothing else should be running.

    python bench/time_to_quality.py --policy data/smollm2-135m --classifier data/sentiment-minilm --reviews data/reviews/train.jsonl \
        --new 16 --seconds 240 --seeds 1 --steps 400 --target 2 --peer "TRL 0.11.4=PYTHON" --config '{"learning_rate": 5e-5, ...}'

is the same job on another model, with the first 2 to 6 words of reviews for prompts; a target that cannot be reached lets every
system run for the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trl.assets

JOB = Path(__file__).with_name("quality_job.py")
COLOURS = ("#2a78d6", "#d6562a", "#3b8f4e", "#8a5bc7")

Row = dict[str, Any]


def for_all(source: Path, folder: Path) -> Path:
    """A copy of a model folder whose tokenizer transformers 4 reads as well."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def beginnings(reviews: Path) -> list[str]:
    """The first 2 to 6 words of texts of more than 8, shuffled; always the same."""
    texts = [json.loads(line)["text"] for line in reviews.read_text(encoding="utf-8").splitlines()]
    random.Random(1).shuffle(texts)
    size = random.Random(2)
    return [" ".join(text.split()[: size.randint(2, 6)]) for text in texts if len(text.split()) > 8][:20000]


def run(python: str, options: list[str]) -> list[Row]:
    """What the job printed: its settings, and a row per step."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # This library is the one that runs here, installed or not; a peer must not find it.
    environment |= {"PYTHONPATH": str(Path(trl.__file__).parents[1]) if python == sys.executable else ""}
    done = subprocess.run([python, str(JOB), *options], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{python} {JOB} {' '.join(options)}\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def reached(rows: list[Row], target: float, in_a_row: int) -> Row | None:
    """The first of the first `in_a_row` rows one after the other that are all above `target`."""
    for start in range(len(rows) - in_a_row + 1):
        if all(row["positive"] > target for row in rows[start : start + in_a_row]):
            return rows[start]
    return None


def pace(rows: list[Row]) -> float:
    """Reviews per second between the first batch and the last."""
    if len(rows) < 2:
        return float("nan")
    first, last = rows[0], rows[-1]
    return (last["samples"] - first["samples"]) / (last["seconds"] - first["seconds"])


def summary(results: dict[str, list[list[Row]]], target: float, in_a_row: int) -> list[Row]:
    """Per system: mean and spread over the seeds that got there, and how many times longer than the first system it took."""
    table = []
    for name, runs in results.items():
        found = [row for rows in runs if (row := reached(rows[1:], target, in_a_row)) is not None]
        seconds, samples = ([row[key] for row in found] for key in ("seconds", "samples"))
        table.append(
            {
                "system": name,
                "trl": runs[0][0]["trl"],
                "unknown": runs[0][0]["unknown"],
                "runs": len(runs),
                "reached": len(found),
                "seconds": statistics.mean(seconds) if found else None,
                "seconds_range": [min(seconds), max(seconds)] if found else None,
                "samples": statistics.mean(samples) if found else None,
                "kl": statistics.mean(row["kl"] for row in found) if found else None,
                "samples_per_second": statistics.mean(pace(rows[1:]) for rows in runs),
            }
        )
    first = table[0]
    for row in table:
        # A mean over some of the seeds is not to be compared with one over all of them.
        whole = row["reached"] == row["runs"] and first["reached"] == first["runs"]
        row["times_longer"] = row["seconds"] / first["seconds"] if whole else None
    return table


def markdown(table: list[Row], target: float, in_a_row: int) -> str:
    lines = [
        "| system | runs that got there | seconds | least to most | reviews | KL then, nats | reviews per second | times longer |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        cells = ["-"] * 4
        if row["reached"]:
            low, high = row["seconds_range"]
            cells = [
                f"{row['seconds']:.0f}",
                f"{low:.0f} to {high:.0f}",
                f"{row['samples']:,.0f}",
                f"{row['kl']:.1f}",
            ]
        ratio = "-" if row["times_longer"] is None else f"{row['times_longer']:.1f}×"
        lines.append(
            f"| {row['system']} | {row['reached']} of {row['runs']} | {' | '.join(cells)} | "
            f"{row['samples_per_second']:.1f} | {ratio} |"
        )
    unknown = {row["system"]: row["unknown"] for row in table if row["unknown"]}
    lines += [
        "",
        f"Seconds, from the end of loading, until the first of {in_a_row} batches in a row whose mean P(POSITIVE) is above "
        f"{target:g} had been scored; means over the seeds.",
        *(f"{system} does not know the settings {', '.join(names)}." for system, names in unknown.items()),
    ]
    return "\n".join(lines) + "\n"


def figure(results: dict[str, list[list[Row]]], target: float, path: Path) -> None:
    """P(POSITIVE) over time, a line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (name, runs) in enumerate(results.items()):
        for i, rows in enumerate(runs):
            axes.plot(
                [row["seconds"] for row in rows[1:]],
                [row["positive"] for row in rows[1:]],
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.5,
                alpha=0.8,
                label=name if i == 0 else None,
            )
    axes.axhline(target, color="#888888", linewidth=1, linestyle=":")
    axes.set(xlabel="seconds since the end of loading", ylabel="mean P(POSITIVE) of a batch", ylim=(0.4, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    for suffix in (".svg", ".png"):
        fig.savefig(path.with_suffix(suffix), dpi=150)
    plt.close(fig)


def named(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--peer", type=named, action="append", default=[], metavar="NAME=PYTHON", help="another library's interpreter")
    add("--ours", type=named, action="append", default=[], metavar="NAME=JSON", help="this library, other settings")
    add("--config", default="{}", help="JSON: settings of PPOConfig, for every system")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=80, help="limit of a run")
    add("--seconds", type=float, default=900.0, help="limit of a run")
    add("--target", type=float, default=0.9)
    add("--in-a-row", type=int, default=5)
    add("--policy", type=Path, help="folder of a language model; else the embedded one")
    add("--classifier", type=Path, help="folder of a classifier; else the embedded one")
    add("--reviews", type=Path, help="a .jsonl file with a `text` per line, for prompts; else the embedded prompts")
    add("--new", type=int, default=48, help="most tokens of a response")
    add("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args(argv)
    from peers import old_format  # beside this file

    common = json.loads(args.config)
    systems = {"this library": (sys.executable, common)}
    systems |= {name: (sys.executable, common | json.loads(more)) for name, more in args.ours}
    systems |= {name: (python, common) for name, python in args.peer}
    results: dict[str, list[list[Row]]] = {name: [] for name in systems}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        policy = args.policy or for_all(Path(trl.assets.path("tiny-gpt2-reviews")), Path(scratch) / "policy")
        old = old_format(policy, Path(scratch) / "old") if args.policy else policy
        classifier = for_all(
            args.classifier or Path(trl.assets.path("tiny-bert-sentiment")), Path(scratch) / "classifier"
        )
        prompts = beginnings(args.reviews) if args.reviews else trl.assets.prompts()
        (Path(scratch) / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        options = [
            "--classifier", str(classifier), "--prompts", f"{scratch}/prompts.json", "--new", str(args.new),
            "--steps", str(args.steps), "--seconds", str(args.seconds), "--target", str(args.target),
            "--in-a-row", str(args.in_a_row),
        ]  # fmt: skip
        for seed in range(args.seeds):
            for name, (python, config) in systems.items():
                folder = policy if python == sys.executable else old
                rows = run(
                    python, [*options, "--policy", str(folder), "--seed", str(seed), "--config", json.dumps(config)]
                )
                results[name].append(rows)
                print(f"{name}, seed {seed}: {json.dumps(reached(rows[1:], args.target, args.in_a_row))}", flush=True)
                (args.out / "runs.json").write_text(json.dumps(results))
    table = summary(results, args.target, args.in_a_row)
    text = markdown(table, args.target, args.in_a_row)
    settings = {"target": args.target, "in_a_row": args.in_a_row, "steps": args.steps, "seconds": args.seconds}
    (args.out / "quality.json").write_text(json.dumps({"table": table, **settings, "runs": results}, indent=1))
    (args.out / "quality.md").write_text(text, encoding="utf-8")
    try:
        figure(results, args.target, args.out / "quality")
    except ImportError as error:
        print(f"no figure: {error}")
    print(text)


if __name__ == "__main__":
    main()
