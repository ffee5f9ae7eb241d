"""TRL 0.11.4's PPO on the job of bench/gpu/bench.py: the same shapes, random weights, lengths and settings. Run by baseline_trl0114.sh.

    python baseline_trl0114.py qwen05 | llama1b  [--mixed bf16 | --weights bfloat16] [--cycles 2]

Weights are float32 and passes too, TRL 0.11's default, unless told: `--mixed bf16` is accelerate's autocast, what a user with a
GPU would ask for; `--weights bfloat16` holds weights and Adam's moments in bfloat16. Prints a line per cycle (the first warms up:
12 new tokens, one epoch) and adds to baseline.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import trl  # noqa: E402
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model  # noqa: E402

GPU = torch.cuda.is_available() and not os.environ.get("GPU_CHECK_CPU")
SHAPES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "qwen05": (Qwen2ForCausalLM, Qwen2Config, dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                                                   num_attention_heads=14, num_key_value_heads=2)),
    "llama1b": (LlamaForCausalLM, LlamaConfig, dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                                    num_attention_heads=32, num_key_value_heads=8)),
}  # fmt: skip
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
JOB = (
    dict(batch=64, prompt=128, new=256, mini=16, epochs=4) if GPU else dict(batch=8, prompt=8, new=8, mini=4, epochs=2)
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    core = Tokenizer(WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w3"
    )


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--mixed", default="no", choices=("no", "bf16"))
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--cycles", type=int, default=1)
    args = parser.parse_args()
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    make, config, numbers = SHAPES[args.shape]
    settings = dict(
        numbers if GPU else TINY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        plain = make(config(**settings)).eval().to(getattr(torch, args.weights))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(plain)
    if GPU:
        model = model.cuda()  # the value head
    ppo = PPOConfig(
        batch_size=JOB["batch"], mini_batch_size=JOB["mini"], ppo_epochs=JOB["epochs"], learning_rate=1e-6, init_kl_coef=0.05,
        gradient_accumulation_steps=1, accelerator_kwargs={"mixed_precision": args.mixed}, log_with=None,
    )  # fmt: skip
    trainer = PPOTrainer(ppo, model, create_reference_model(model), tokenizer())
    device = trainer.accelerator.device
    generator = torch.Generator().manual_seed(0)
    rows = []
    for cycle in range(args.cycles + 1):
        warm = cycle == 0
        new, trainer.config.ppo_epochs = (min(12, JOB["new"]), 1) if warm else (JOB["new"], JOB["epochs"])
        queries = [
            torch.randint(3, settings["vocab_size"], (JOB["prompt"],), generator=generator).to(device)
            for _ in range(JOB["batch"])
        ]
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        sync()
        started = time.perf_counter()
        responses = trainer.generate(
            queries, return_prompt=False, batch_size=JOB["batch"], max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0,
            top_p=1.0, pad_token_id=0,
        )  # fmt: skip
        sync()
        sampled = time.perf_counter()
        assert all(len(r) == new for r in responses), [len(r) for r in responses][:5]
        stats = trainer.step(queries, list(responses), [torch.tensor(float(i % 5) - 2) for i in range(len(responses))])
        sync()
        done = time.perf_counter()
        rows.append(
            dict(trl=trl.__version__, transformers=transformers.__version__, torch=torch.__version__, device=str(device), shape=args.shape,
                 weights=args.weights, mixed=args.mixed, tf32=args.tf32, cycle="warm" if warm else cycle, sampling=sampled - started,
                 tokens_per_s=JOB["batch"] * new / (sampled - started), step=done - sampled,
                 scoring=float(stats["time/ppo/forward_pass"]), update=float(stats["time/ppo/optimize_step"]),
                 peak_gb=torch.cuda.max_memory_allocated() / 1e9 if GPU else None, kl=float(stats["objective/kl"]))
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    path = Path(os.environ.get("OUT", ".")) / "baseline.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps(before + rows, indent=1))


if __name__ == "__main__":
    main()
