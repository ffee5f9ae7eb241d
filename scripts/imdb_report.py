"""Turns the run folders of examples/imdb_sentiment.py into docs/results/imdb.md and its figure.

    python scripts/imdb_report.py runs/imdb [runs/other ...] --page docs/results/imdb.md

The first folder is the run that is shown; the others are listed among the settings that were tried. What stands in the
page outside of the marked block is left alone. Needs matplotlib: pip install matplotlib.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tenth(rows: list[dict[str, Any]], which: int) -> list[dict[str, Any]]:
    """The first (0) or last (-1) tenth of the steps, at least one."""
    n = max(1, len(rows) // 10)
    return rows[:n] if which == 0 else rows[-n:]


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def interval(rows: list[dict[str, Any]], batch: int) -> tuple[float, float]:
    """Mean score and half its 95% interval, from the spread within the batches."""
    variance = statistics.mean(row["score_std"] ** 2 for row in rows)
    return mean_of(rows, "score_mean"), 1.96 * math.sqrt(variance / (len(rows) * batch))


def draw(rows: list[dict[str, Any]], batch: int, path: Path) -> None:
    """Score, KL and explained variance over the samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = [row["samples"] for row in rows]
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, constrained_layout=True)
    means = [row["score_mean"] for row in rows]
    half = [1.96 * row["score_std"] / math.sqrt(batch) for row in rows]
    low, high = ([m + s * h for m, h in zip(means, half, strict=True)] for s in (-1, 1))
    axes[0].fill_between(x, low, high, alpha=0.2, color="#0969da", linewidth=0)
    axes[0].plot(x, means, color="#0969da", label=f"mean of {batch}, with its 95% interval")
    axes[0].plot(x, [row["score_median"] for row in rows], color="#8250df", linewidth=1, label="median")
    axes[0].set_ylabel("score: logit for POSITIVE")
    axes[0].legend(frameon=False)
    axes[1].plot(x, [row["objective/kl"] for row in rows], color="#bc4c00")
    axes[1].axhline(10, color="#59636e", linestyle=":", linewidth=1)
    axes[1].set_ylabel("KL, nats per response")
    axes[2].plot(x, [row["ppo/val/var_explained"] for row in rows], color="#1a7f37")
    axes[2].set_ylabel("explained variance\nof the returns")
    axes[2].set_ylim(max(-1.0, min(row["ppo/val/var_explained"] for row in rows) - 0.05), 1.0)
    axes[2].set_xlabel("samples")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cell(text: str) -> str:
    """Model text as data in a Markdown table."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("`", "&#96;").replace("*", "&#42;")


def settings_row(folder: Path) -> str:
    settings = json.loads((folder / "settings.json").read_text())
    rows = read_rows(folder / "metrics.jsonl")
    first, last = interval(tenth(rows, 0), settings["batch_size"]), interval(tenth(rows, -1), settings["batch_size"])
    return (
        f"| {settings['learning_rate']:g} | {settings['ppo_epochs']} | {settings['init_kl_coef']:g} | "
        f"{settings['mini_batch_size']} | {rows[-1]['samples']} | {first[0]:+.2f} ± {first[1]:.2f} | "
        f"{last[0]:+.2f} ± {last[1]:.2f} | {mean_of(rows, 'objective/kl'):.1f} | {rows[-1]['minutes']:.0f} |"
    )


def report(folders: list[Path], figure: str, examples: int) -> str:
    """The marked block of the page."""
    folder = folders[0]
    settings = json.loads((folder / "settings.json").read_text())
    rows = read_rows(folder / "metrics.jsonl")
    batch = settings["batch_size"]
    first, last = tenth(rows, 0), tenth(rows, -1)
    (a, da), (b, db) = interval(first, batch), interval(last, batch)
    lines = [
        f"![Score, KL and explained variance over {rows[-1]['samples']} samples]({figure})",
        "",
        f"| | first tenth ({len(first)} steps) | last tenth ({len(last)} steps) |",
        "| --- | --- | --- |",
        f"| mean score (95% interval) | {a:+.2f} ± {da:.2f} | {b:+.2f} ± {db:.2f} |",
    ]
    for label, key, form in (
        ("median score", "score_median", "{:+.2f}"),
        ("KL to the reference, nats per response", "objective/kl", "{:.2f}"),
        ("KL coefficient", "objective/kl_coef", "{:.3f}"),
        ("explained variance of the returns", "ppo/val/var_explained", "{:.2f}"),
        ("entropy, nats per token", "ppo/policy/entropy", "{:.2f}"),
        ("share of clipped tokens", "ppo/policy/clipfrac", "{:.3f}"),
    ):
        lines.append(f"| {label} | {form.format(mean_of(first, key))} | {form.format(mean_of(last, key))} |")
    seconds = [mean_of(rows, f"time/{part}") for part in ("generate", "score", "step")]
    lines += [
        "",
        f"{rows[-1]['samples']} samples in {rows[-1]['minutes']:.0f} minutes, {len(rows)} steps; mean KL over the whole run "
        f"{mean_of(rows, 'objective/kl'):.2f} nats. A step took {sum(seconds):.1f} s on average: sampling {seconds[0]:.1f} s, "
        f"the classifier {seconds[1]:.1f} s, `step` {seconds[2]:.1f} s.",
        "",
        "## Settings tried",
        "",
        "| learning rate | epochs | KL coefficient at first | mini-batch | samples | score, first tenth | last tenth | "
        "mean KL | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(settings_row(f) for f in folders),
        "",
        "The first row is the run above.",
    ]
    completions = read_rows(folder / "completions.jsonl")
    before = [row for row in completions if row["when"] == "before"]
    after = [row for row in completions if row["when"] == "after"]
    if after:
        lines += [
            "",
            "## The same held-out openings, before and after",
            "",
            f"Mean score of {len(after)} openings that were never trained on: {mean_of(before, 'score'):+.2f} before, "
            f"{mean_of(after, 'score'):+.2f} after. The first {examples} of them, not chosen:",
            "",
            "| opening | before | score | after | score |",
            "| --- | --- | --- | --- | --- |",
        ]
        for x, y in list(zip(before, after, strict=True))[:examples]:
            lines.append(
                f"| {cell(x['query'])} | {cell(x['response'])} | {x['score']:+.2f} | {cell(y['response'])} | "
                f"{y['score']:+.2f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, default=Path("docs/results/imdb.md"))
    parser.add_argument("--examples", type=int, default=12)
    args = parser.parse_args(argv)
    figure = args.page.parent.parent / "img" / "imdb.png"
    settings = json.loads((args.folders[0] / "settings.json").read_text())
    draw(read_rows(args.folders[0] / "metrics.jsonl"), settings["batch_size"], figure)
    page = args.page.read_text(encoding="utf-8") if args.page.exists() else f"# Sentiment\n\n{BEGIN}\n{END}\n"
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{args.page} lacks the markers {BEGIN} and {END}")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    block = report(args.folders, f"../img/{figure.name}", args.examples)
    args.page.write_text(f"{head}{BEGIN}\n{block}\n{END}{tail}", encoding="utf-8")
    print(f"wrote {args.page} and {figure}")


if __name__ == "__main__":
    main()
