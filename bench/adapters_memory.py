"""Peak memory of PPO with policy, reference, reward and value on one base, beside one adapter and beside separate models.

    python bench/adapters_memory.py                                # random weights of SmolLM2-135M's shape
    python bench/adapters_memory.py --model data/smollm2-135m      # a model folder

Each row is two PPO steps (16 queries of 8 tokens, responses of 24) in a process of its own, on Linux: bytes of parameters,
and the peak of resident memory. The promise is a peak of "all on one base" of at most 1.4 times that of "one adapter".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.rewards import AdapterReward, Sample, as_reward

JOBS = ("one adapter", "all on one base", "separate models")
TARGETS = ["q_proj", "v_proj"]
BATCH, QUERY, RESPONSE = 16, 8, 24


def make_folders(root: Path, model: str | None, layers: int) -> Path:
    """Writes an SFT adapter and a reward adapter; returns the base's folder."""
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = root / "base" if model is None else Path(model)
    if model is None:
        config = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(base)
    for name, kind, task in (
        ("sft", AutoModelForCausalLM, "CAUSAL_LM"),
        ("reward", AutoModelForSequenceClassification, "SEQ_CLS"),
    ):
        arguments = {"num_labels": 1} if task == "SEQ_CLS" else {}
        settings = peft.LoraConfig(r=16, target_modules=TARGETS, task_type=task, init_lora_weights=False)
        trunk = kind.from_pretrained(base, dtype=torch.float32, **arguments)
        peft.get_peft_model(trunk, settings).save_pretrained(root / name, save_embedding_layers=False)
    return base


def run(job: str, root: Path, base: str) -> dict[str, float]:
    """Two PPO steps of one job; bytes of parameters and peak memory in MB."""
    import peft

    from trl.assets import path as asset
    from trl.pretrained import load_tokenizer

    models: list[nn.Module] = []
    if job == "one adapter":
        fresh = peft.LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=fresh)
        reward: Any = as_reward(lambda completion_ids, completions: [len(set(ids)) / 10 for ids in completion_ids])
    elif job == "all on one base":
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            root / "sft", is_trainable=True, reward_adapter=root / "reward", reference_adapter=root / "sft"
        )
        reward = as_reward(AdapterReward(model))
    else:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(root / "sft", is_trainable=True)
        fresh = peft.LoraConfig(r=16, target_modules=TARGETS, task_type="CAUSAL_LM")
        second = AutoModelForCausalLMWithValueHead.from_pretrained(
            base, peft_config=fresh, reward_adapter=root / "reward"
        )
        models.append(second)
        reward = as_reward(AdapterReward(second))
    config = PPOConfig(batch_size=BATCH, mini_batch_size=4, learning_rate=1e-4, seed=0)
    trainer = PPOTrainer(config, model, None, load_tokenizer(str(asset("tiny-gpt2-reviews"))))
    models += [model] if trainer.ref_model is None else [model, trainer.ref_model]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        queries = list(torch.randint(5, 2000, (BATCH, QUERY), generator=generator))
        responses = trainer.generate(
            queries, return_prompt=False, max_new_tokens=RESPONSE, do_sample=True, top_k=0, eos_token_id=None
        )
        samples = [
            Sample(
                prompt="",
                completion="",
                prompt_ids=tuple(q.tolist()),
                completion_ids=tuple(r.tolist()),
                columns={},
            )
            for q, r in zip(queries, responses, strict=True)
        ]
        scores = [torch.tensor(float(score or 0.0)) for score in reward.score(samples).scores]
        trainer.step(queries, responses, scores)
    distinct = {id(p): p for m in models for p in m.parameters()}.values()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {
        "parameters": sum(p.numel() * p.element_size() for p in distinct) / 2**20,
        "peak": int(peak.split()[1]) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama-like model; by default random weights")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        warnings.simplefilter("ignore")
        print(json.dumps(run(given.job, given.root, given.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = make_folders(Path(folder), given.model, given.layers)
        print("| job | parameters, MB | peak, MB | of one adapter |\n| --- | --- | --- | --- |")
        first = 0.0
        for job in JOBS:
            command = [sys.executable, __file__, "--job", job, "--root", folder, "--model", str(base)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            numbers = json.loads(done.stdout.splitlines()[-1])
            first = first or numbers["peak"]
            ratio = numbers["peak"] / first
            print(f"| {job} | {numbers['parameters']:.0f} | {numbers['peak']:.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
