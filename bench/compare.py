"""The same PPO job on this library and on its peers, in turn on the same machine: ratios, as JSON and Markdown.

    python scripts/fetch_assets.py
    python bench/compare.py --make-peers ~/peers --peers 0.11.4 --rounds 2 --out runs/bench

`--make-peers DIR` builds a virtual environment per peer (needs pip and a package index). Every round runs each system once,
one after the other; the medians of all cycles but the first of each run are compared. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

JOB = Path(__file__).with_name("job.py")
PEERS: dict[str, list[str]] = {
    "0.11.4": [
        "numpy<2", "pyarrow<18", "pandas<2.3", "transformers==4.46.3", "accelerate==1.1.1", "datasets==3.1.0",
        "peft==0.13.2", "trl==0.11.4", "rich",
    ],
    "0.4.6": [
        "numpy<2", "pyarrow<14", "pandas<2.2", "transformers==4.33.3", "accelerate==0.23.0", "datasets==2.14.5",
        "peft==0.5.0", "huggingface_hub<0.18", "trl==0.4.6",
    ],
}  # fmt: skip


def make_peer(folder: Path, version: str) -> Path:
    """The interpreter of a peer's environment, made if it is not there."""
    python = folder / f"trl-{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "torch==2.13.0"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[version]], check=True)
    return python


def old_format(model: Path, folder: Path) -> Path:
    """A copy of a Llama-style model folder that transformers 4 reads."""
    if (folder / "config.json").exists():
        return folder
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = (config.pop("rope_parameters", None) or {}).get("rope_theta", 10000.0)
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in tokenizer.items() if isinstance(v, str) and k.endswith("_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = json.loads((folder / "tokenizer.json").read_text())
    merges = words["model"].get("merges", [])
    words["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    words["model"].pop("ignore_merges", None)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


def run(python: Path, model: Path, reviews: Path, options: list[str]) -> list[dict[str, Any]]:
    """The rows that the job printed."""
    command = [str(python), str(JOB), "--model", str(model), "--reviews", str(reviews), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(results: dict[str, list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Medians per system, and how many times faster the first system is."""
    rows = []
    for name, runs in results.items():
        cycles = [row for rows_ in runs for row in rows_ if row.get("cycle", 0) > 0]
        medians = {key: statistics.median(c[key] for c in cycles) for key in ("sample_s", "step_s", "samples_per_s")}
        rows.append({"system": name, **medians, "peak_mb": max(r[-1]["peak_mb"] for r in runs), "cycles": len(cycles)})
    for row in rows:
        row["ours_is"] = rows[0]["samples_per_s"] / row["samples_per_s"]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| system | sampling, s | `step`, s | samples/s | peak, MB | ours is |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        lines.append(
            f"| {r['system']} | {r['sample_s']:.1f} | {r['step_s']:.1f} | {r['samples_per_s']:.2f} | {r['peak_mb']:.0f} | "
            f"{r['ours_is']:.1f}× |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=Path("data/smollm2-135m"))
    add("--reviews", type=Path, default=Path("data/reviews/train.jsonl"))
    add("--make-peers", type=Path, required=True, metavar="DIR")
    add("--peers", nargs="*", default=["0.11.4"], choices=sorted(PEERS))
    add("--rounds", type=int, default=2)
    add("--out", type=Path, default=Path("runs/bench"))
    args, job = parser.parse_known_args(argv)
    old = old_format(args.model, args.make_peers / "model-transformers-4") if args.peers else args.model
    systems: dict[str, tuple[Path, Path, list[str]]] = {
        "this library": (Path(sys.executable), args.model, []),
        "this library, dtype=float32": (Path(sys.executable), args.model, ["--config", '{"dtype": "float32"}']),
    }
    for version in args.peers:
        python = make_peer(args.make_peers, version)
        systems[f"TRL {version}, float32"] = (python, old, [])
        systems[f"TRL {version}, bfloat16 weights"] = (python, old, ["--weights", "bfloat16"])
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in systems}
    for _ in range(args.rounds):
        for name, (python, model, options) in systems.items():
            results[name].append(run(python, model, args.reviews, [*options, *job]))
            print(name, json.dumps(results[name][-1][1:]), flush=True)
    rows = table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compare.json").write_text(json.dumps({"rows": rows, "job": job, "runs": results}, indent=1))
    (args.out / "compare.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
