"""Positive film reviews with LoRA: only an adapter and the value head learn, and the base model is its own reference.

    pip install peft
    python examples/lora_sentiment.py

Policy and classifier are the two tiny models that come with the package; `--model` and `--classifier` take other
folders or hub ids. `ref_model=None` makes the trainer turn the adapter off where it needs the reference, so that no
second copy of the model is in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoTokenizer

import trl.assets
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.rewards import ClassifierReward


class Prompts(Dataset):
    """Queries of 1-D token ids, the same prompts over and over."""

    def __init__(self, tokenizer, size: int) -> None:
        self.queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in trl.assets.prompts()]
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.queries[index % len(self.queries)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=trl.assets.path("tiny-gpt2-reviews"), help="folder or hub id of the policy")
    add("--classifier", default=trl.assets.path("tiny-bert-sentiment"), help="folder or hub id of the reward")
    add("--label", default="POSITIVE", help="the classifier's label that is the score")
    add("--steps", type=int, default=30)
    add("--batch-size", type=int, default=64, help="a multiple of 4")
    add("--rank", type=int, default=16, help="of the adapter's matrices")
    add("--learning-rate", type=float, default=2e-3, help="ten times that of whole weights")
    add("--new-tokens", type=int, default=24)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/lora_sentiment"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    try:
        from peft import LoraConfig
    except ImportError:
        raise SystemExit("LoRA needs peft: pip install peft") from None

    set_seed(args.seed)  # adapter and value head start at random
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    config = AutoConfig.from_pretrained(args.model, trust_remote_code=False)
    adapter = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules="all-linear",
        fan_in_fan_out=config.model_type == "gpt2",  # its matrices stand transposed
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model, peft_config=adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained")

    config = PPOConfig(
        seed=args.seed,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        mini_batch_size=args.batch_size // 4,
        ppo_epochs=2,
        max_grad_norm=1.0,
        init_kl_coef=0.2,
        target=8,
        horizon=1000,
    )
    prompts = Prompts(tokenizer, args.steps * args.batch_size)
    trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer, dataset=prompts, data_collator=list)
    reward = ClassifierReward.from_pretrained(args.classifier, label=args.label, device=trainer.current_device)

    history = []
    for step, queries in enumerate(trainer.dataloader, start=1):
        responses = trainer.generate(
            queries,
            batch_size=args.batch_size,
            return_prompt=False,
            max_new_tokens=args.new_tokens,
            do_sample=True,
            top_k=0,
        )
        scores = reward(tokenizer.batch_decode(queries), tokenizer.batch_decode(responses, skip_special_tokens=True))
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in scores])
        history.append((sum(scores) / len(scores), stats["objective/kl"]))
        print(f"step {step}/{args.steps}  score {history[-1][0]:+.2f}  KL {history[-1][1]:.2f}", flush=True)

    trainer.save_pretrained(args.out)
    print(f"the adapter and its value head are in {args.out}")
    reloaded = AutoModelForCausalLMWithValueHead.from_pretrained(args.out)
    for prompt in trl.assets.prompts()[:3]:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = reloaded.generate(
            **inputs, max_new_tokens=args.new_tokens, do_sample=True, top_k=0, pad_token_id=tokenizer.eos_token_id
        )
        print(f"  {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")

    tenth = max(1, len(history) // 10)
    first, last = history[:tenth], history[-tenth:]
    result = {
        "first_score": sum(score for score, _ in first) / tenth,
        "last_score": sum(score for score, _ in last) / tenth,
        "last_kl": sum(kl for _, kl in last) / tenth,
    }
    print(
        f"mean score {result['first_score']:+.2f} in the first tenth, {result['last_score']:+.2f} in the last; "
        f"KL {result['last_kl']:.2f}"
    )
    return result


if __name__ == "__main__":
    main()
