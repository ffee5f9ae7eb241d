"""One PPO job through the step interface: runs unchanged on this library and on TRL 0.4 to 0.11.

    python bench/job.py --model FOLDER --reviews FILE.jsonl [--weights float32 | bfloat16] [--cycles 4] ...

Prints a JSON line per cycle (seconds of sampling and of `step`, and of `step`'s parts as the library reports them) and the
peak memory of the process last. The score is a cheap function of the tokens, so that the library alone is timed. The first
cycle warms up and is to be left out.

`--ragged N` cuts responses to random lengths after all of them were sampled in full: the peers' `generate` has one length
for a whole batch, so this is equal for all, and the update sees what an eos token leaves of a batch. `--lora R` trains an
adapter, whose base is the reference. `--t5` trains an encoder-decoder of random weights (69M parameters) that reads the
tokens of `--model`'s tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")  # of old libraries under a new torch

import torch  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, T5Config, T5ForConditionalGeneration  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="folder of a language model")
    add("--reviews", type=Path, required=True, help="a .jsonl file with a `text` per line")
    add("--weights", choices=("float32", "bfloat16"), default="float32")
    add("--config", default="{}", help="JSON: more settings of PPOConfig")
    for name, usual in (("batch", 16), ("mini", 4), ("epochs", 4), ("query", 8), ("new", 48), ("cycles", 4)):
        add(f"--{name}", type=int, default=usual)
    add(
        "--ragged",
        type=int,
        default=0,
        metavar="N",
        help="responses of N to --new tokens, drawn for each; 0: all of --new",
    )
    add("--lora", type=int, default=0, metavar="R", help="train an adapter of this rank; 0: train the whole model")
    add("--lora-targets", nargs="+", default=["q_proj", "v_proj"], metavar="NAME", help="the layers it is added to")
    add("--t5", action="store_true", help="a T5 of random weights instead of the model")
    return parser.parse_args(arguments)


def queries_of(tokenizer: Any, path: Path, length: int, count: int) -> list[torch.Tensor]:
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(4000), strict=False)]
    random.Random(0).shuffle(texts)
    found: list[torch.Tensor] = []
    for text in texts:
        tokens = tokenizer(text[:400], return_tensors="pt").input_ids[0][:length]
        if len(tokens) == length:
            found.append(tokens)
        if len(found) == count:
            return found
    raise SystemExit(f"{path} has {len(found)} reviews of {length} tokens; {count} are needed")


def t5_config(tokenizer: Any) -> T5Config:
    """T5-small with the vocabulary of `tokenizer`; responses begin with token 0, which no text has."""
    return T5Config(
        vocab_size=len(tokenizer), d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip


def model_of(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The policy with its value head; the same call in every library."""
    from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

    options: dict[str, Any] = {}
    both = args.t5 or AutoConfig.from_pretrained(args.model, trust_remote_code=False).is_encoder_decoder
    if args.lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(
            r=args.lora,
            lora_alpha=2 * args.lora,
            target_modules=args.lora_targets,
            task_type="SEQ_2_SEQ_LM" if both else "CAUSAL_LM",
        )
    dtype = getattr(torch, args.weights)
    if args.t5:
        torch.manual_seed(0)
        plain = T5ForConditionalGeneration(t5_config(tokenizer)).to(dtype)
        return AutoModelForSeq2SeqLMWithValueHead.from_pretrained(plain, **options)
    loader = AutoModelForSeq2SeqLMWithValueHead if both else AutoModelForCausalLMWithValueHead
    return loader.from_pretrained(args.model, torch_dtype=dtype, **options)


def main() -> None:
    # Other scripts take this one's reader of reviews without any of these libraries.
    import trl
    from trl import PPOConfig, PPOTrainer, create_reference_model

    args = parse()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    tokenizer.padding_side = "left"
    model = model_of(args, tokenizer)
    settings = dict(batch_size=args.batch, mini_batch_size=args.mini, ppo_epochs=args.epochs, learning_rate=1e-5)
    config = PPOConfig(**settings, **json.loads(args.config))
    reference = None if args.lora else create_reference_model(model)
    trainer = PPOTrainer(config, model, reference, tokenizer)
    queries = queries_of(tokenizer, args.reviews, args.query, args.cycles * args.batch)
    lengths = random.Random(1)
    start = int(trainer.is_encoder_decoder)  # the decoder's start token, which is not sampled
    for cycle in range(args.cycles):
        some = queries[cycle * args.batch : (cycle + 1) * args.batch]
        started = time.perf_counter()
        responses = trainer.generate(
            some, return_prompt=False, batch_size=args.batch, max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=True, top_k=0, top_p=1.0, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        sampled = time.perf_counter()
        sample_tokens = sum(len(r) - start for r in responses)
        if args.ragged:
            responses = [r[: start + lengths.randint(args.ragged, args.new)] for r in responses]
        scores = [torch.tensor(len(set(r.tolist())) / len(r)) for r in responses]
        stats = trainer.step(some, list(responses), scores)
        done = time.perf_counter()
        row = {
            "trl": trl.__version__,
            "cycle": cycle,
            "sample_s": sampled - started,
            "step_s": done - sampled,
            "samples_per_s": args.batch / (done - started),
            "sample_tokens": sample_tokens,
            "tokens_per_s": sample_tokens / (sampled - started),
            "kl": float(stats["objective/kl"]),
        }
        for name, key in (("forward_s", "forward_pass"), ("optimize_s", "optimize_step")):
            if f"time/ppo/{key}" in stats:
                row[name] = float(stats[f"time/ppo/{key}"])
        print(json.dumps(row), flush=True)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
