"""What OpenMP's waiting policies cost, idle and beside a busy process.

    python bench/under_load.py [--rounds 3] [--steps 8] [--json runs/bench/under_load.json]

For each candidate, in fresh processes and in turn: some steps of the demo, and of a step like the main job's (a model of
hidden size 576 and 8 layers with random weights, batch 16, mini-batch 4, responses of 48 tokens), each alone and beside one
process that keeps a core busy. Prints the medians of the rounds, and their ratio. Nothing else may be running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CANDIDATES: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"spin {count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 10_000, 30_000, 100_000)},
}
BUSY = "while True: pass"
# Both print the seconds of their steps, without those of imports and loading; the first step warms up and does not count.
DEMO = """
import sys, time
from trl.demo.outcome import DemoSettings
import torch, trl.assets
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.rewards import ClassifierReward
s, steps = DemoSettings(), int(sys.argv[1])
torch.manual_seed(0)
folder = trl.assets.path("tiny-gpt2-reviews")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
config = PPOConfig(learning_rate=s.learning_rate, batch_size=s.batch_size, mini_batch_size=s.batch_size // s.minibatches,
                   ppo_epochs=s.epochs, temperature=s.temperature)
trainer = PPOTrainer(config, model, create_reference_model(model, num_shared_layers=s.shared_layers), tokenizer)
reward = ClassifierReward.from_pretrained(trl.assets.path("tiny-bert-sentiment"))
prompts = (trl.assets.prompts() * s.batch_size)[: s.batch_size]
queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
seconds = []
for _ in range(steps + 1):
    started = time.perf_counter()
    responses = trainer.generate(queries, batch_size=s.batch_size, return_prompt=False, max_new_tokens=s.new_tokens,
                                 do_sample=True, top_k=0, temperature=s.temperature)
    scores = reward(prompts, [tokenizer.decode(r) for r in responses])
    trainer.step(queries, responses, [torch.tensor(x) for x in scores])
    seconds.append(time.perf_counter() - started)
print(sum(seconds[1:]))
"""
JOB = """
import sys, time
import torch, trl.assets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
steps = max(1, int(sys.argv[1]) // 4)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(trl.assets.path("tiny-gpt2-reviews"))
config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
                     num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
model = AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config))
trainer = PPOTrainer(PPOConfig(batch_size=16, mini_batch_size=4, ppo_epochs=4), model, tokenizer=tokenizer)
queries = [torch.randint(5, len(tokenizer), (8,)) for _ in range(16)]
seconds = []
for _ in range(steps + 1):
    started = time.perf_counter()
    responses = trainer.generate(queries, batch_size=16, return_prompt=False, max_new_tokens=48, min_new_tokens=48,
                                 do_sample=True, top_k=0)
    trainer.step(queries, responses, [torch.tensor(float(len(set(r.tolist())))) for r in responses])
    seconds.append(time.perf_counter() - started)
print(sum(seconds[1:]))
"""
PROGRAMS = {"demo": DEMO, "main-job-like": JOB}


def measure(program: str, candidate: str, steps: int, *, busy: bool) -> float:
    """Seconds of a program's steps in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment |= CANDIDATES[candidate] | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAMS[program], str(steps)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    finally:
        if other is not None:
            other.kill()
            other.wait()


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Medians as a table; `results` by program and candidate, with the key `candidate/busy` or `candidate/idle`."""
    lines = ["| | idle, s | beside a busy process, s | ratio |", "| --- | --- | --- | --- |"]
    for program, measured in results.items():
        for candidate in dict.fromkeys(key.rpartition("/")[0] for key in measured):
            idle, busy = (statistics.median(measured[f"{candidate}/{load}"]) for load in ("idle", "busy"))
            lines.append(f"| {program}, {candidate} | {idle:.1f} | {busy:.1f} | {busy / idle:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of the demo; a quarter as many of the other")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--json", type=Path, default=Path("runs/bench/under_load.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.3:
        print(f"warning: the load is {load:.1f}: something else is running", file=sys.stderr)
    results: dict[str, dict[str, list[float]]] = {program: {} for program in args.programs}
    for number in range(args.rounds):
        for program in args.programs:
            for candidate in args.candidates:
                for busy in (False, True):
                    key = f"{candidate}/{'busy' if busy else 'idle'}"
                    seconds = measure(program, candidate, args.steps, busy=busy)
                    results[program].setdefault(key, []).append(seconds)
                    print(
                        f"{time.strftime('%H:%M:%S')} round {number + 1}: {program}, {key}: {seconds:.1f} s",
                        file=sys.stderr,
                    )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
