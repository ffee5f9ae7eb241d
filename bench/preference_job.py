"""DPO and reward models on pairs of responses: this library and TRL 1.16, in turn on the same machine.

    python scripts/fetch_assets.py
    python bench/preference_job.py --stage dpo --make-peers ~/peers [--rounds 2] [--pairs 4] [--steps 6] ...
    python bench/preference_job.py --stage reward --make-peers ~/peers

The same script, with the same settings, is the job of both: a prompt of 16 words, its review's continuation as the chosen
response and another review's as the rejected one, up to `--length` tokens; `--pairs` pairs in an optimizer step, the defaults of
each config for the rest. Nothing else should be running.

"whole run" is everything after the model is loaded: tokenising, the reference, every step; the reference is computed before the
first step here and in each step there. "step" is the median of all steps but the first, which warms up.

`--alone` is the job itself: a JSON line per optimizer step, and totals last. It runs unchanged in an environment with TRL 1.
`--shape` takes the model's configuration with random weights in place of its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SYSTEMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # name: peer ("": this library), settings
    "dpo": {
        "this library": ("", {}),
        "this library, no recomputed activations": ("", {"gradient_checkpointing": False}),
        "this library, reference in every step": ("", {"precompute_ref_log_probs": False}),
        "this library, float32": ("", {"bf16": False, "gradient_checkpointing": False}),
        "TRL 1.16": ("1.16", {}),
        "TRL 1.16, no recomputed activations": ("1.16", {"gradient_checkpointing": False}),
        "TRL 1.16, reference computed once": (
            "1.16",
            {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
        ),
        "TRL 1.16, float32": ("1.16", {"bf16": False, "gradient_checkpointing": False}),
    },
    "reward": {
        "this library": ("", {}),
        "this library, no recomputed activations": ("", {"gradient_checkpointing": False}),
        "this library, float32": ("", {"bf16": False, "gradient_checkpointing": False}),
        "TRL 1.16": ("1.16", {}),
        "TRL 1.16, no recomputed activations": ("1.16", {"gradient_checkpointing": False}),
        "TRL 1.16, float32": ("1.16", {"bf16": False, "gradient_checkpointing": False}),
    },
}
PROMPT_WORDS = 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--stage", choices=sorted(SYSTEMS), default="dpo")
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    add("--reviews", type=Path, default=Path("data/reviews/train.jsonl"), help="a .jsonl file with a `text` per line")
    add("--alone", action="store_true", help="run the job in this process")
    add("--shape", action="store_true", help="random weights of the model's configuration")
    add("--make-peers", type=Path, metavar="DIR", help="environments of the peers; made if they are missing")
    add("--out", type=Path, default=Path("runs/bench"))
    add("--config", default="{}", help="JSON: more settings of the stage's config")
    for name, usual in (("pairs", 4), ("length", 256), ("steps", 6), ("rounds", 2)):
        add(f"--{name}", type=int, default=usual)
    return parser.parse_args(arguments)


def pairs_of(path: Path, count: int) -> list[dict[str, str]]:
    """Prompts with the continuation of their own review, and with that of the next one."""
    with path.open(encoding="utf-8") as lines:
        texts = [words for line in lines if len(words := json.loads(line)["text"].split()) > 2 * PROMPT_WORDS]
    texts = texts[: count + 1]
    return [
        {
            "prompt": " ".join(own[:PROMPT_WORDS]),
            "chosen": " " + " ".join(own[PROMPT_WORDS:]),
            "rejected": " " + " ".join(other[PROMPT_WORDS:]),
        }
        for own, other in pairwise(texts)
    ]


def job(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from datasets import Dataset

    import trl

    base = {"dpo": trl.DPOTrainer, "reward": trl.RewardTrainer}[args.stage]
    config_class = {"dpo": trl.DPOConfig, "reward": trl.RewardConfig}[args.stage]
    parent = {"dpo": transformers.AutoModelForCausalLM, "reward": transformers.AutoModelForSequenceClassification}

    class TimedTrainer(base):  # type: ignore[misc, valid-type]
        """Notes when every optimizer step began."""

        def __init__(self, *given: Any, **named: Any) -> None:
            self.begun: list[float] = []
            super().__init__(*given, **named)

        def training_step(self, *given: Any, **named: Any) -> Any:
            self.begun.append(time.perf_counter())
            return super().training_step(*given, **named)

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"dtype": torch.float32, "trust_remote_code": False}
    if args.stage == "reward":
        options["num_labels"] = 1
    if args.shape:
        labels = {"num_labels": 1} if args.stage == "reward" else {}
        config = transformers.AutoConfig.from_pretrained(args.model, trust_remote_code=False, **labels)
        model = parent[args.stage].from_config(config, dtype=torch.float32, trust_remote_code=False)
    else:
        model = parent[args.stage].from_pretrained(args.model, **options)
    # Texts are cut here, since one library leaves out what is too long for a reward model and the other's DPO cuts it.
    steps = args.steps + 1
    rows = [cut(row, tokenizer, args.length) for row in pairs_of(args.reviews, args.pairs * steps)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "max_length": args.length + 8, "per_device_train_batch_size": args.pairs, "max_steps": steps,
            "learning_rate": 1e-5, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1, "output_dir": folder,
        }  # fmt: skip
        started = time.perf_counter()
        trainer = TimedTrainer(
            model=model,
            args=config_class(**(settings | json.loads(args.config))),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        ready = time.perf_counter()
        trainer.train()
        ended = time.perf_counter()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    for step, seconds in enumerate(b - a for a, b in pairwise(trainer.begun)):
        print(json.dumps({"trl": trl.__version__, "cycle": step, "step_s": seconds, "loss": logs[step]["loss"]}))
    totals = {
        "prepare_s": ready - started,
        "whole_s": ended - started,
        "pairs_per_s": args.pairs * steps / (ended - started),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(totals), flush=True)


def cut(row: dict[str, str], tokenizer: Any, length: int) -> dict[str, str]:
    """The row with responses that have at most `length` tokens with their prompt."""
    room = length - len(tokenizer(row["prompt"])["input_ids"])
    short = {name: tokenizer.decode(tokenizer(row[name])["input_ids"][:room]) for name in ("chosen", "rejected")}
    return {"prompt": row["prompt"], **short}


def table(results: dict[str, list[list[dict[str, Any]] | str]]) -> str:
    """Markdown: medians of the runs, and how many times the pairs/s of each system ours has."""
    lines = [
        "| system | whole run, pairs/s | step, s | loss of the last step | peak, MB | ours is |",
        "| --- " * 6 + "|",
    ]
    ours = 0.0
    for name, runs in results.items():
        whole = [rows for rows in runs if not isinstance(rows, str)]
        if not whole:
            lines.append(f"| {name} ({next(iter(runs), 'not run yet')}) | | | | | |")
            continue
        speed = statistics.median(rows[-1]["pairs_per_s"] for rows in whole)
        ours = ours or speed
        steps = [row for rows in whole for row in rows if row.get("cycle", 0) > 0]
        seconds = statistics.median(row["step_s"] for row in steps)
        peak = max(rows[-1]["peak_mb"] for rows in whole)
        lines.append(
            f"| {name} | {speed:.2f} | {seconds:.2f} | {steps[-1]['loss']:.4f} | {peak:.0f} | {ours / speed:.2f}× |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse()
    if args.alone:
        job(args)
        return
    from compare import machine, run
    from peers import make_peer

    if args.make_peers is None:
        raise SystemExit("--make-peers DIR: where the environment of TRL 1.16 is, or is to be made")
    pythons = {"": Path(sys.executable), "1.16": make_peer(args.make_peers, "1.16")}
    systems = SYSTEMS[args.stage]
    results: dict[str, list[Any]] = {name: [] for name in systems}
    args.out.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        for name, (peer, settings) in systems.items():
            options = ["--alone", "--stage", args.stage, "--model", str(args.model), "--reviews", str(args.reviews)]
            options += ["--config", json.dumps(settings | json.loads(args.config))]
            options += [f"--{key}={getattr(args, key)}" for key in ("pairs", "length", "steps")]
            options += ["--shape"] if args.shape else []
            try:
                results[name].append(run(pythons[peer], "preference_job.py", options, not peer, timeout=3600))
            except RuntimeError as error:
                results[name].append(str(error))
            print(name, json.dumps(results[name][-1]), flush=True)
            report = {"job": args.stage, "options": {k: str(v) for k, v in vars(args).items()}, "machine": machine()}
            (args.out / f"{args.stage}.json").write_text(json.dumps(report | {"runs": results}, indent=1) + "\n")
            (args.out / f"{args.stage}.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
