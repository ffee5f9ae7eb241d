"""Positive film reviews with an encoder-decoder: a tiny T5 reads an opening, and its decoder writes how the review goes on.

    python examples/t5_sentiment.py

The T5 is made here, in a minute or so: it learns to continue openings as the tiny GPT-2 that comes with the package does
(same vocabulary, its embeddings to begin with, its next-token distributions as the target). Then PPO makes it write
what the tiny BERT classifier calls positive. For a T5 of your own leave the first half out and load it with
`AutoModelForSeq2SeqLMWithValueHead.from_pretrained`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

import trl.assets
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
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
    add("--pretrain-steps", type=int, default=300, help="of making the T5")
    add("--steps", type=int, default=50, help="of PPO")
    add("--batch-size", type=int, default=64, help="a multiple of 4")
    add("--learning-rate", type=float, default=1e-3)
    add("--new-tokens", type=int, default=24)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/t5_sentiment"))
    return parser.parse_args(arguments)


def tiny_t5(teacher, tokenizer) -> T5ForConditionalGeneration:
    """A T5 of two and two layers over the teacher's vocabulary. One token pads, starts the decoder and ends a text."""
    end = tokenizer.eos_token_id
    config = T5Config(
        vocab_size=teacher.config.vocab_size,
        d_model=teacher.config.n_embd,
        d_kv=32,
        d_ff=4 * teacher.config.n_embd,
        num_layers=2,
        num_heads=5,
        dropout_rate=0.0,
        pad_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        model.shared.weight.copy_(teacher.get_input_embeddings().weight)
    return model


@torch.no_grad()
def continuations(teacher, queries: list[torch.Tensor], new_tokens: int, end: int) -> dict[str, torch.Tensor]:
    """What the teacher writes after some openings, with its distribution at every token."""
    width = max(len(query) for query in queries)
    prompts = torch.stack([F.pad(query, (width - len(query), 0), value=end) for query in queries])  # padded on the left
    attention = torch.stack([torch.arange(width) >= width - len(query) for query in queries])
    written = teacher.generate(
        prompts,
        attention_mask=attention,
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_logits=True,
    )
    responses = written.sequences[:, width:]  # [B, N]
    ended = (responses == end).cumsum(dim=1)
    return {
        "input_ids": prompts,
        "attention_mask": attention.long(),
        "decoder_input_ids": F.pad(responses[:, :-1], (1, 0), value=end),
        "logprobs": torch.stack(written.logits, dim=1).log_softmax(dim=-1),  # [B, N, V]
        "counted": ended - (responses == end).long() == 0,  # [B, N] up to the first end token
    }


def pretrain(model, teacher, queries: Dataset, *, steps: int, batch_size: int, new_tokens: int) -> float:
    """Teaches the T5 to continue openings as the teacher does; returns the last KL(teacher || T5), nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    passes, pieces = 2, 4  # one call of the teacher serves this many passes over this many batches
    losses: list[float] = []
    while len(losses) < steps:
        start = len(losses) // passes * batch_size
        openings = [queries[start + i] for i in range(pieces * batch_size)]
        texts = continuations(teacher, openings, new_tokens, model.config.eos_token_id)
        for rows in torch.cat([torch.randperm(len(openings)) for _ in range(passes)]).split(batch_size):
            batch = {name: tensor[rows] for name, tensor in texts.items()}
            target, counted = batch.pop("logprobs"), batch.pop("counted")
            logprobs = model(**batch).logits.log_softmax(dim=-1)
            loss = F.kl_div(logprobs[counted], target[counted], log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                print(f"pre-training {len(losses)}/{steps}  KL {losses[-1]:.2f} nats per token", flush=True)
            if len(losses) == steps:
                break
    return losses[-1]


def sample(model, tokenizer, prompts: list[str], new_tokens: int) -> list[str]:
    """What an encoder-decoder makes of some prompts."""
    written = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=True, top_k=0)
        written.append(f"{prompt} ...{tokenizer.decode(tokens[0], skip_special_tokens=True)}")
    return written


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    args = parse(arguments)
    set_seed(args.seed)
    folder = trl.assets.path("tiny-gpt2-reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    teacher = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    t5 = tiny_t5(teacher, tokenizer)
    pretrain(
        t5,
        teacher,
        Prompts(tokenizer, args.pretrain_steps * args.batch_size),
        steps=args.pretrain_steps,
        batch_size=args.batch_size,
        new_tokens=args.new_tokens,
    )
    shown = trl.assets.prompts()[:3]
    print("before:", *sample(t5, tokenizer, shown, args.new_tokens), sep="\n  ")

    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(t5)
    config = PPOConfig(
        seed=args.seed,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        mini_batch_size=args.batch_size // 4,
        ppo_epochs=2,
        max_grad_norm=1.0,
        init_kl_coef=0.03,
        target=8,
        horizon=2000,
        vf_coef=0.2,
        cliprange_value=2.0,  # scores are log-odds: values have far to go
    )
    trainer = PPOTrainer(
        config,
        model,
        create_reference_model(model),
        tokenizer,
        dataset=Prompts(tokenizer, args.steps * args.batch_size),
        data_collator=list,
    )
    reward = ClassifierReward.from_pretrained(trl.assets.path("tiny-bert-sentiment"), device=trainer.current_device)
    history = []
    for step, queries in enumerate(trainer.dataloader, start=1):
        # A response begins with the decoder's start token, which is given, and not learnt from.
        responses = trainer.generate(
            queries, batch_size=args.batch_size, max_new_tokens=args.new_tokens, do_sample=True, top_k=0
        )
        scores = reward(tokenizer.batch_decode(queries), tokenizer.batch_decode(responses, skip_special_tokens=True))
        stats = trainer.step(queries, responses, [torch.tensor(score) for score in scores])
        history.append((sum(scores) / len(scores), stats["objective/kl"]))
        print(f"step {step}/{args.steps}  score {history[-1][0]:+.2f}  KL {history[-1][1]:.2f}", flush=True)

    trainer.save_pretrained(args.out)
    reloaded = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(args.out)
    print(f"saved in {args.out}; from there:", *sample(reloaded, tokenizer, shown, args.new_tokens), sep="\n  ")

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
