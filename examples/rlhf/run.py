"""RLHF from end to end, from one YAML file: SFT, a reward model, PPO, and beside it DPO and best-of-n on the same data.

    python examples/rlhf/run.py examples/rlhf/reviews.yaml --seed 0
    python examples/rlhf/run.py examples/rlhf/summaries.yaml --seed 0  # an encoder-decoder: SFT and PPO on summaries

The judge of the result is a classifier that was not the reward. Every stage has a folder of its own under `--out`, with a
`result.json` once it is done; `--resume` skips stages that are done, and goes on with the one that was interrupted from its
last checkpoint. docs/examples.md explains the stages, docs/results/rlhf.md has results.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from stages import Pipeline, Settings
from summaries import Summaries, SummarySettings
from transformers.utils import logging as transformers_logging

from trl.files import write_atomic

PIPELINES: dict[str, Any] = {"reviews": (Settings, Pipeline), "summaries": (SummarySettings, Summaries)}
STAGES = ("data", "sft", "reward", "ppo", "dpo", "judged")
CONFIG, RESULT = "pipeline.json", "result.json"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the pipeline; returns the results by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file, such as examples/rlhf/reviews.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the run; by default runs/rlhf-NAME-SEED")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments = parser.parse_args(argv)
    root = arguments.out or Path("runs") / f"rlhf-{arguments.config.stem}-{arguments.seed}"
    given = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) or {}
    name = given.pop("pipeline", "reviews")
    if name not in PIPELINES:
        raise ValueError(f"{arguments.config}: pipeline: {name!r} must be one of {', '.join(PIPELINES)}")
    kind, stages = PIPELINES[name]
    settings = kind.of(given, arguments.config)
    pipeline = stages(settings, root, arguments.seed)
    begin(root, asdict(settings) | {"seed": arguments.seed}, resume=arguments.resume)
    warnings.filterwarnings("ignore", "no dataset is given")
    transformers_logging.disable_progress_bar()
    results = {}
    for stage, method in pipeline.stages.items():
        path = root / stage / RESULT
        if path.exists():
            print(f"{stage}: done before", flush=True)
            results[stage] = json.loads(path.read_text(encoding="utf-8"))
            continue
        started = time.perf_counter()
        print(f"{stage} ...", flush=True)
        (root / stage).mkdir(exist_ok=True)
        results[stage] = method() | {"seconds": time.perf_counter() - started}
        write_atomic(path, json.dumps(results[stage], indent=1).encode())
    text = pipeline.table(results)
    write_atomic(root / "results.json", json.dumps(summary(results), indent=1).encode())
    write_atomic(root / "results.md", text.encode())
    print(text)
    return results


def begin(root: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Makes the folder of a new run, or checks that the one to resume has the same settings for the stages that have begun."""
    path = root / CONFIG
    if path.exists():
        if not resume:
            raise SystemExit(f"{root} has a run already: --resume goes on with it, --out NAME begins another")
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = []
        for name, value in settings.items():
            stage = "judged" if name == "best_of_n" else name
            begun = stage not in STAGES or (root / stage).exists()  # `base`, `judge` and others concern every stage
            if begun and value != before.get(name):
                changed.append(name)
        if changed:
            raise SystemExit(
                f"{root} was begun with other settings of {', '.join(changed)}: use those, or give a new --out"
            )
    elif root.exists() and any(root.iterdir()):
        raise SystemExit(f"{root} has other files: give an empty or a new folder as --out")
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=1).encode())


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the results without single responses."""
    judged = {
        name: {key: value for key, value in part.items() if key != "rows"} if isinstance(part, dict) else part
        for name, part in results["judged"].items()
    }
    return results | {"judged": judged}


if __name__ == "__main__":
    main()
