"""Supervised fine-tuning on packed rows: this library and TRL 1.16's SFTTrainer, in turn on the same machine.

    python scripts/fetch_assets.py
    python bench/sft_job.py --make-peers ~/peers [--rounds 2] [--rows 4] [--steps 6] [--config '{"bf16": false}'] ...

The same script, with the same settings, is the job of both: packed rows of `--length` tokens, `--rows` of them in an optimizer
step, AdamW, the defaults of each SFTConfig for the rest. The first step of each run warms up and is left out; the table has the
median of the others and the highest peak memory of a process. Nothing else should be running.

`python bench/sft_job.py --alone` is the job itself: a JSON line per optimizer step, and the peak memory last. It runs unchanged
in an environment with TRL 1. `--shape` takes the model's configuration with random weights in place of its weights.
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
from pathlib import Path
from typing import Any

SYSTEMS = {  # name in the table: peer ("": this library), settings of SFTConfig
    "this library": ("", {}),
    "this library, no recomputed activations": ("", {"gradient_checkpointing": False}),
    "this library, float32": ("", {"bf16": False}),
    "TRL 1.16": ("1.16", {}),
    "TRL 1.16, no recomputed activations": ("1.16", {"gradient_checkpointing": False}),
    "TRL 1.16, float32": ("1.16", {"bf16": False}),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    add("--reviews", type=Path, default=Path("data/reviews/train.jsonl"), help="a .jsonl file with a `text` per line")
    add("--alone", action="store_true", help="run the job in this process")
    add("--shape", action="store_true", help="random weights of the model's configuration")
    add("--make-peers", type=Path, metavar="DIR", help="environments of the peers; made if they are missing")
    add("--out", type=Path, default=Path("runs/bench"))
    add("--config", default="{}", help="JSON: more settings of SFTConfig")
    for name, usual in (("rows", 4), ("length", 512), ("steps", 6), ("rounds", 2)):
        add(f"--{name}", type=int, default=usual)
    return parser.parse_args(arguments)


def texts_of(path: Path, characters: int) -> list[dict[str, str]]:
    """Whole reviews, as many as hold so many characters."""
    texts: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if characters <= 0:
                break
            texts.append({"text": json.loads(line)["text"]})
            characters -= len(texts[-1]["text"])
    return texts


def job(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import trl
    from trl import SFTConfig, SFTTrainer

    class TimedTrainer(SFTTrainer):  # type: ignore[misc]
        """Notes the tokens and the end of every optimizer step, the weights' update included."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.tokens: list[int] = []
            self.ends: list[float] = []

        def training_step(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            self.ends.append(time.perf_counter())
            shown = inputs.get("attention_mask")
            self.tokens.append(int(inputs["input_ids"].numel() if shown is None else shown.sum()))
            return super().training_step(model, inputs, *given, **named)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    if args.shape:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    # Eight characters a token: more than enough rows.
    texts = texts_of(args.reviews, 8 * args.length * args.rows * (args.steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "packing": True, "max_length": args.length, "per_device_train_batch_size": args.rows, "max_steps": args.steps + 1,
            "learning_rate": 1e-5, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1,
        }  # fmt: skip
        trainer = TimedTrainer(
            model=model,
            args=SFTConfig(output_dir=folder, **(settings | json.loads(args.config))),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    for step in range(args.steps):  # from the beginning of a pass to that of the next: the last step only ends one
        seconds = trainer.ends[step + 1] - trainer.ends[step]
        row = {
            "trl": trl.__version__,
            "cycle": step,
            "step_s": seconds,
            "tokens": trainer.tokens[step],
            "tokens_per_s": trainer.tokens[step] / seconds,
            "loss": losses[step],
        }
        print(json.dumps(row), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def table(results: dict[str, list[list[dict[str, Any]] | str]]) -> str:
    """Markdown: medians of all steps but the first of each run, and how many times the tokens/s of each system ours has."""
    lines = ["| system | tokens/s | step, s | loss of the last step | peak, MB | ours is |", "| --- " * 6 + "|"]
    ours = 0.0
    for name, runs in results.items():
        whole = [rows for rows in runs if not isinstance(rows, str)]
        steps = [row for rows in whole for row in rows if row.get("cycle", 0) > 0]
        if not steps:
            error = next((rows for rows in runs if isinstance(rows, str)), "not run yet")
            lines.append(f"| {name} ({error}) | | | | | |")
            continue
        speed = statistics.median(row["tokens_per_s"] for row in steps)
        ours = ours or speed
        seconds = statistics.median(row["step_s"] for row in steps)
        peak = max(rows[-1]["peak_mb"] for rows in whole)
        lines.append(
            f"| {name} | {speed:.0f} | {seconds:.2f} | {steps[-1]['loss']:.4f} | {peak:.0f} | {ours / speed:.2f}× |"
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
    results: dict[str, list[Any]] = {name: [] for name in SYSTEMS}
    args.out.mkdir(parents=True, exist_ok=True)
    for _ in range(args.rounds):
        for name, (peer, settings) in SYSTEMS.items():
            config = json.dumps(settings | json.loads(args.config))
            options = ["--alone", "--model", str(args.model), "--reviews", str(args.reviews), "--config", config]
            options += [f"--{key}={getattr(args, key)}" for key in ("rows", "length", "steps")]
            options += ["--shape"] if args.shape else []
            try:
                results[name].append(run(pythons[peer], "sft_job.py", options, not peer, timeout=3600))
            except RuntimeError as error:
                results[name].append(str(error))
            print(name, json.dumps(results[name][-1]), flush=True)
            report = {"job": "sft", "options": {k: str(v) for k, v in vars(args).items()}, "machine": machine()}
            (args.out / "sft.json").write_text(json.dumps(report | {"runs": results}, indent=1) + "\n")
            (args.out / "sft.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
