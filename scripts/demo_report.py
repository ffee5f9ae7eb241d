"""Turns the run folders of `python -m trl.demo` into docs/results/demo.md, the README's picture and its table.

    for seed in 0 1 2; do python -m trl.demo --seed $seed --out runs/demo-$seed; done
    python scripts/demo_report.py runs/demo-0 runs/demo-1 runs/demo-2

The first folder is the one that is drawn. What stands in the pages outside of the marked blocks is left alone.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
from pathlib import Path
from typing import Any

from demo_figure import DARK, LIGHT, Curves, standalone

from trl.runs.progress import clock
from trl.trackers import read_metrics
from trl.untrusted import one_line

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Summary, a row per step, and the held-out reviews of a run."""
    rows = read_metrics(folder)
    summary, reviews = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("demo.json", "reviews.json")
    )
    if summary["interrupted"]:
        raise SystemExit(f"{folder} was interrupted after {summary['steps']} steps: it is no result")
    return summary, rows, reviews


def cell(text: str) -> str:
    """Model text as data in a Markdown table."""
    return (
        html.escape(one_line(text))
        .replace("|", "&#124;")
        .replace("`", "&#96;")
        .replace("*", "&#42;")
        .replace("_", "&#95;")
    )


def texts_table(reviews: dict[str, Any], count: int) -> list[str]:
    """The first prompts with what was written before and after; none is chosen."""
    lines = ["| prompt | P | before | P | after |", "| --- | --- | --- | --- | --- |"]
    for old, new in list(zip(reviews["before"], reviews["after"], strict=True))[:count]:
        lines.append(
            f"| {cell(old['prompt'])} … | {old['positive']:.2f} | {cell(old['response'])} | {new['positive']:.2f} | "
            f"{cell(new['response'])} |"
        )
    return lines


def picture(prefix: str, summary: dict[str, Any]) -> list[str]:
    after, before = summary["after"]["positive"], summary["before"]["positive"]
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{prefix}demo-dark.svg">',
        f'  <img alt="Mean P(POSITIVE) of a batch and KL per step; on held-out prompts {before:.2f} before and {after:.2f} '
        f'after." src="{prefix}demo-light.svg">',
        "</picture>",
    ]


def results(folders: list[Path], examples: int) -> list[str]:
    """The marked block of docs/results/demo.md."""
    runs = [read(folder) for folder in folders]
    lines = [
        *picture("../img/", runs[0][0]),
        "",
        f"Seed {runs[0][0]['seed']}. Held-out: {len(runs[0][2]['before'])} responses, to prompts never trained on.",
        "",
        "| seed | P(POSITIVE) before | after | last batch | KL, nats | perplexity under the reference | different word pairs | "
        "time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for summary, rows, _ in runs:
        before, after = summary["before"], summary["after"]
        lines.append(
            f"| {summary['seed']} | {before['positive']:.2f} | {after['positive']:.2f} | {rows[-1]['reward/positive/mean']:.2f} | "
            f"{after['kl']:.1f} | {before['perplexity']:.0f} → {after['perplexity']:.0f} | {before['distinct_2']:.0%} → "
            f"{after['distinct_2']:.0%} | {clock(summary['seconds'])} |"
        )
    settings = runs[0][0]["settings"]
    mean = statistics.mean(summary["after"]["positive"] for summary, _, _ in runs)
    samples = runs[0][1][-1]["run/episodes"]
    lines += [
        "",
        f"Mean over the seeds after {runs[0][0]['steps']} steps, {samples:,} reviews: {mean:.3f}. Time is of the whole program.",
        "",
        f"## The same prompts before and after, seed {runs[0][0]['seed']}",
        "",
        f"The first {examples}, not chosen, with the same random numbers both times:",
        "",
        *texts_table(runs[0][2], examples),
        "",
        "## Settings",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| `{name}` | {value} |" for name, value in settings.items() if name != "seed"),
    ]
    return lines


def readme(folder: Path, examples: int) -> list[str]:
    """The marked block of the README."""
    summary, rows, reviews = read(folder)
    return [
        *picture("docs/img/", summary),
        "",
        f"`make demo`, {rows[-1]['run/episodes']:,} reviews in {clock(summary['seconds'])} on two CPU cores; three seeds and all "
        "settings in [docs/results/demo.md](docs/results/demo.md). The same held-out prompts before and after:",
        "",
        *texts_table(reviews, examples),
    ]


def curves(folder: Path) -> Curves:
    summary, rows, _ = read(folder)
    return Curves(
        score=[row["reward/positive/mean"] for row in rows],
        kl=[row["objective/kl"] for row in rows],
        batch_size=summary["settings"]["batch_size"],
        held_out=(summary["before"]["positive"], summary["after"]["positive"]),
    )


def replace_block(page: Path, lines: list[str]) -> None:
    """Puts lines between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} lacks the markers {BEGIN} and {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(head + "\n".join([BEGIN, *lines, END]) + tail, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--examples", type=int, default=10)
    args = parser.parse_args(argv)
    replace_block(args.root / "docs/results/demo.md", results(args.folders, args.examples))
    replace_block(args.root / "README.md", readme(args.folders[0], 3))
    for colours in ("light", "dark"):
        drawing = standalone(curves(args.folders[0]), LIGHT if colours == "light" else DARK)
        (args.root / f"docs/img/demo-{colours}.svg").write_text(drawing, encoding="utf-8")
    print("wrote docs/results/demo.md, README.md, docs/img/demo-light.svg and docs/img/demo-dark.svg")


if __name__ == "__main__":
    main()
