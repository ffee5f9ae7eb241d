"""One setting at a time on the embedded models, and docs/results/settings.md from what came out.

    python scripts/settings_sweep.py                 # trains what runs/settings/ does not hold yet; --seeds 2
    python scripts/settings_sweep.py --page          # writes the table of the page from what is there

The job is that of docs/start/first-run.md: short film reviews, scored by the embedded sentiment classifier.
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "settings.md"
SAMPLES = 2560  # per run, whatever the batch size
BASE: dict[str, Any] = {
    "batch_size": 64,
    "mini_batch_size": 16,
    "ppo_epochs": 2,
    "learning_rate": 3e-4,
    "init_kl_coef": 0.05,
    "target": 6.0,
    "horizon": 1000,
}
VARIATIONS: list[dict[str, Any]] = [
    {},
    *({"learning_rate": rate} for rate in (1e-5, 1e-4, 1e-3, 3e-3)),
    *({"mini_batch_size": size} for size in (1, 4, 64)),
    *({"ppo_epochs": epochs} for epochs in (1, 4)),
    *({"batch_size": size} for size in (16, 256)),
    *({"target": target} for target in (2.0, 15.0)),
    *({"init_kl_coef": coef, "adap_kl_ctrl": False} for coef in (0.0, 0.05, 0.2)),
]


def name(variation: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in variation.items()) or "base"


def train(variation: dict[str, Any], seed: int) -> dict[str, Any]:
    """Final held-out score, KL, repetition and update statistics of one run."""
    from transformers import AutoTokenizer

    import trl.assets
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from trl.rewards import ClassifierReward

    settings = BASE | variation
    folder = trl.assets.path("tiny-gpt2-reviews")
    trainer = PPOTrainer(
        PPOConfig(seed=seed, dtype="float32", **settings),
        AutoModelForCausalLMWithValueHead.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )
    reward = ClassifierReward.from_pretrained(trl.assets.path("tiny-bert-sentiment"), label="POSITIVE")
    prompts = trl.assets.prompts()
    completions: list[list[str]] = []

    def watched(samples: list[Any]) -> list[Any]:
        completions.append([sample.completion for sample in samples])
        return reward([s.prompt for s in samples], [s.completion for s in samples])

    rows: list[dict[str, Any]] = []

    class Keep:
        def log(self, row: Any, step: int) -> None:
            rows.append(dict(row))

        def close(self) -> None:
            pass

    steps = SAMPLES // settings["batch_size"]
    trainer.train(
        prompts[::2],
        reward=watched,
        steps=steps,
        generation={"max_new_tokens": 16},
        eval_prompts=prompts[1::2][:64],
        eval_every=steps,
        on_spike=None,
        trackers=[Keep()],
        progress=False,
    )
    tail = rows[-max(1, steps // 8) :]
    held_out = [text.split() for text in completions[-1]]
    pairs = [pair for words in held_out for pair in pairwise(words)]
    return {
        "name": name(variation),
        "seed": seed,
        "score": rows[-1]["eval/score_mean"],
        "first": rows[0]["score/mean"],
        "kl": mean(row["objective/kl"] for row in tail),
        "clipfrac": mean(row["ppo/policy/clipfrac"] for row in tail),
        "explained": mean(row["ppo/val/var_explained"] for row in tail),
        "distinct": len(set(pairs)) / max(len(pairs), 1),
        "updates": steps * settings["ppo_epochs"] * settings["batch_size"] // settings["mini_batch_size"],
    }


def spread(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def page(results: list[dict[str, Any]]) -> str:
    """The table between the markers of the page."""
    lines = [
        "| changed against the base | optimizer steps | held-out score | KL, nats | clipped share | explained variance | distinct word pairs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variation in VARIATIONS:
        runs = [result for result in results if result["name"] == name(variation)]
        if runs:
            columns = [("score", "+.2f"), ("kl", ".1f"), ("clipfrac", ".3f"), ("explained", ".2f"), ("distinct", ".2f")]
            cells = [spread([run[key] for run in runs], form) for key, form in columns]
            label = "nothing" if not variation else ", ".join(f"`{k}={v}`" for k, v in variation.items())
            lines.append(f"| {label} | {runs[0]['updates']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "settings")
    parser.add_argument("--page", action="store_true", help="write the page instead of training")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if args.page:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- settings:begin -->")
        _, _, after = rest.partition("<!-- settings:end -->")
        table = f"<!-- settings:begin -->\n{page(results)}\n<!-- settings:end -->"
        PAGE.write_text(before + table + after, encoding="utf-8")
        return
    done = {(result["name"], result["seed"]) for result in results}
    for seed in range(args.seeds):
        for variation in VARIATIONS:
            if (name(variation), seed) not in done:
                result = train(variation, seed)
                with log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
