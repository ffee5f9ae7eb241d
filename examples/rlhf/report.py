"""Writes the results of several seeds of examples/rlhf as Markdown: a row per seed, their means, and responses.

for seed in 0 1 2; do python examples/rlhf/run.py examples/rlhf/reviews.yaml --seed $seed; done
python examples/rlhf/report.py runs/rlhf-reviews-0 runs/rlhf-reviews-1 runs/rlhf-reviews-2
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
from pathlib import Path
from typing import Any

from trl.untrusted import one_line

METHODS = {"ppo": "PPO", "dpo": "DPO", "best_of_n": "best of n"}


def main(argv: list[str] | None = None) -> str:
    """Prints the report; returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of finished runs; responses are of the first")
    parser.add_argument("--responses", type=int, default=6, help="prompts to show with all responses")
    arguments = parser.parse_args(argv)
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in arguments.folders]
    seeds = [json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))["seed"] for folder in arguments.folders]
    judged = json.loads((arguments.folders[0] / "judged" / "result.json").read_text(encoding="utf-8"))
    lines = [*numbers(seeds, runs), "", *responses(judged, arguments.responses)]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    return text


def numbers(seeds: list[int], runs: list[dict[str, Any]]) -> list[str]:
    """Returns a table with a row per seed, and their means ± standard deviations."""
    columns: dict[str, tuple[list[float], str]] = {
        "reward model, held-out pairs": ([run["reward"]["accuracy"] for run in runs], ".1%")
    }
    for key, name in METHODS.items():
        parts = [run["judged"][key] for run in runs]
        columns[f"{name}: win rate"] = [part["win_rate"]["value"] for part in parts], ".1%"
        columns[f"{name}: score"] = [part["difference"]["value"] for part in parts], "+.2f"
        columns[f"{name}: KL" if "low" in parts[0]["kl"] else f"{name}: KL at most"] = (
            [part["kl"]["value"] for part in parts],
            ".2f",
        )
    lines = [f"| seed | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for i, seed in enumerate(seeds):
        lines.append(f"| {seed} | " + " | ".join(f"{values[i]:{form}}" for values, form in columns.values()) + " |")
    means = [
        f"{statistics.fmean(values):{form}} ± {statistics.stdev(values) if len(values) > 1 else 0.0:{form.lstrip('+')}}"
        for values, form in columns.values()
    ]
    return [*lines, f"| mean ± standard deviation | {' | '.join(means)} |"]


def responses(judged: dict[str, Any], count: int) -> list[str]:
    """Returns a table of the first prompts with the responses and scores of every model."""
    lines = ["| prompt | model | score | response |", "| --- | --- | --- | --- |"]
    best = {row["prompt"]: row for row in judged["best_of_n"]["rows"]}
    dpo = {row["prompt"]: row for row in judged["dpo"]["rows"]}
    for row in judged["ppo"]["rows"][:count]:
        prompt = row["prompt"]
        for model, score, text in (
            ("SFT", row["base_score"], row["base"]),
            ("PPO", row["trained_score"], row["trained"]),
            ("DPO", dpo[prompt]["trained_score"], dpo[prompt]["trained"]),
            (f"best of {judged['best_of_n']['n']}", best[prompt]["score"], best[prompt]["response"]),
        ):
            lines.append(f"| {cell(prompt)} … | {model} | {score:.2f} | {cell(text)} |")
    return lines


def cell(text: str) -> str:
    """Returns a model's text as data in a Markdown table."""
    return html.escape(one_line(text)).translate({ord(mark): f"&#{ord(mark)};" for mark in "|`*_"})


if __name__ == "__main__":
    main()
