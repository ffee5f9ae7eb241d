"""How our own cycle scales: cost of a token by batch and by length, and peak memory by length.

    python bench/curves.py [--model FOLDER --reviews FILE.jsonl] [--only batch length memory] [--out runs/bench]

Each point is a run of job.py in a process of its own, with one epoch. Writes curves.json, curves.md and, where matplotlib is
installed, curves.png and curves.svg, anew after every point. The share of attention is counted (roofline.py), not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import roofline
from compare import machine, run

CURVES: dict[str, list[dict[str, int]]] = {
    "batch": [{"batch": batch, "new": 48, "cycles": 3} for batch in (16, 64, 256)],
    "length": [{"batch": 16, "new": new, "cycles": 3} for new in (48, 256, 512)],
    "memory": [{"batch": 16, "new": new, "cycles": 1} for new in (64, 256, 1024)],
}
QUERY, MINI, EPOCHS = 8, 4, 1


def point(setting: dict[str, int], rows: list[dict[str, Any]], weights: roofline.Weights | None) -> dict[str, Any]:
    """One line: costs of a token in milliseconds, over what is sampled and over what `step` reads."""
    batch, new = setting["batch"], setting["new"]
    cycles = [row for row in rows if row.get("cycle", 0) > 0] or [row for row in rows if "cycle" in row]
    line: dict[str, Any] = {**setting, "peak_mb": rows[-1]["peak_mb"]}
    sample_s, step_s = (statistics.median(c[key] for c in cycles) for key in ("sample_s", "step_s"))
    line |= {
        "sample_s": sample_s,
        "step_s": step_s,
        "sample_ms_per_token": 1e3 * sample_s / (batch * new),
        "step_ms_per_token": 1e3 * step_s / (batch * (QUERY + new)),
        "cold": setting["cycles"] == 1,  # the only cycle also warmed up: its seconds are not to be compared
    }
    if weights is not None:
        job = roofline.Job.of(batch=batch, mini=MINI, epochs=EPOCHS, query=QUERY, new=new)
        parts = roofline.phases(weights, job, 2)
        for within in ("sample", "step"):
            mine = [p for p in parts if p.within == within]
            line[f"{within}_attention"] = sum(p.attention_flops for p in mine) / sum(p.flops for p in mine)
    return line


def markdown(found: dict[str, list[dict[str, Any]]]) -> str:
    text: list[str] = []
    for name, lines in found.items():
        text += [
            f"## {name}", "",
            "| batch | new tokens | sampling, ms/token | `step`, ms/token | attention's share, sampling | `step` | peak, MB |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]  # fmt: skip
        for line in lines:
            if "failed" in line:
                text.append(f"| {line['batch']} | {line['new']} | failed: {line['failed']} | | | | |")
                continue
            warm = ["", ""] if line["cold"] else [f"{line[f'{w}_ms_per_token']:.2f}" for w in ("sample", "step")]
            shares = [f"{100 * line[f'{w}_attention']:.1f}%" for w in ("sample", "step")]
            cells = [str(line["batch"]), str(line["new"]), *warm, *shares, f"{line['peak_mb']:.0f}"]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)


def plot(found: dict[str, list[dict[str, Any]]], stem: Path) -> None:
    """Three panels, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for panel, (name, axis) in zip(panels, (("batch", "batch"), ("length", "new"), ("memory", "new")), strict=True):
        lines = [line for line in found.get(name, []) if "failed" not in line]
        x = [line[axis] for line in lines]
        if name == "memory":
            panel.plot(x, [line["peak_mb"] / 1024 for line in lines], "o-", color="tab:green")
            panel.set_ylabel("peak memory, GiB")
        else:
            for within, label in (("sample", "sampling"), ("step", "step, one epoch")):
                panel.plot(x, [line[f"{within}_ms_per_token"] for line in lines], "o-", label=label)
            panel.set_ylabel("ms per token")
            panel.legend()
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [str(value) for value in x])
        panel.set_ylim(bottom=0)
        panel.set_xlabel({"batch": "batch (48 new tokens)", "new": "new tokens (batch 16)"}[axis])
    for kind in ("png", "svg"):
        figure.savefig(stem.with_suffix(f".{kind}"))
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    add("--reviews", type=Path, default=Path("data/reviews/train.jsonl"))
    add("--only", nargs="+", choices=sorted(CURVES), default=list(CURVES))
    add("--cycles", type=int, help="of batch and length; the first is left out")
    add("--timeout", type=float, default=3600)
    add("--out", type=Path, default=Path("runs/bench"))
    add("--config", default="{}", help="JSON: more settings of PPOConfig")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    weights = roofline.weights_of(roofline.config_of(args.model, t5=False))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    for name in args.only:
        for setting in CURVES[name]:
            if args.cycles and name != "memory":
                setting = setting | {"cycles": args.cycles}
            options = ["--model", str(args.model), "--reviews", str(args.reviews), "--config", args.config]
            fixed = {"query": QUERY, "mini": MINI, "epochs": EPOCHS}
            options += [word for key, value in (setting | fixed).items() for word in (f"--{key}", str(value))]
            try:
                line = point(setting, run(Path(sys.executable), "job.py", options, True, args.timeout), weights)
            except RuntimeError as error:
                line = setting | {"failed": str(error)}
            found[name].append(line)
            print(name, json.dumps(line), flush=True)
            report = {"machine": machine(), "config": args.config, "curves": found}
            (args.out / "curves.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "curves.md").write_text(markdown(found))
            plot(found, args.out / "curves")


if __name__ == "__main__":
    main()
