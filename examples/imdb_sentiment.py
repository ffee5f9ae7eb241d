"""The classic example: a language model learns to continue movie reviews positively.

A query is the first few words of a review, a response what the model makes of it, and the score the classifier's logit
for POSITIVE on both. On a connected machine the defaults are hub ids:

    python examples/imdb_sentiment.py --out runs/imdb

Anywhere else, with the models and reviews of scripts/fetch_assets.py and scripts/train_classifier.py:

    python examples/imdb_sentiment.py --model data/smollm2-135m --classifier data/sentiment-minilm \
        --dataset data/reviews/train.jsonl --samples 4096 --out runs/imdb

The folder `--out` receives metrics.jsonl (a row per step), completions.jsonl (held-out queries continued before and
after), settings.json and the model. scripts/imdb_report.py turns it into a page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, pipeline

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="gpt2", help="hub id or folder of the language model")
    add("--classifier", default="lvwerra/distilbert-imdb", help="hub id or folder of the sentiment classifier")
    add("--dataset", default="stanfordnlp/imdb", help="hub id, or a .jsonl file with a `text` per line")
    add("--out", type=Path, default=Path("runs/imdb"))
    add("--samples", type=int, default=20_000, help="responses to learn from, in all")
    add("--batch-size", type=int, default=64)
    add("--mini-batch-size", type=int, default=16)
    add("--ppo-epochs", type=int, default=4)
    add("--learning-rate", type=float, default=1.41e-5)
    add(
        "--warmup-steps",
        type=int,
        default=0,
        help="steps over which the learning rate rises; Adam's first ones are long",
    )
    add("--init-kl-coef", type=float, default=0.2)
    add("--target-kl-per-sequence", type=float, default=6.0, help="what the adaptive controller steers to, in nats")
    add("--query-tokens", type=int, nargs=2, default=(2, 8), metavar=("MIN", "MAX"))
    add("--response-tokens", type=int, nargs=2, default=(16, 24), metavar=("MIN", "MAX"))
    add("--heldout", type=int, default=64, help="queries that are continued before and after, never trained on")
    add("--seed", type=int, default=0)
    add("--log-with", default=None, help="wandb, tensorboard ...")
    add("--save-every", type=int, default=20, help="steps between two saves of the model")
    return parser.parse_args(argv)


def load_texts(source: str) -> list[str]:
    """Reviews of more than 200 characters, as in TRL's example; shorter ones make poor queries."""
    if Path(source).suffix == ".jsonl":
        with open(source, encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
    else:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ImportError("a dataset of the hub needs: pip install datasets") from error
        texts = load_dataset(source, split="train")["text"]
    return [text.replace("<br />", " ") for text in texts if len(text) > 200]


def build_queries(texts: list[str], tokenizer: Any, shortest: int, longest: int) -> list[torch.Tensor]:
    """The first `shortest` to `longest` tokens of each text."""
    length = LengthSampler(shortest, longest + 1)
    queries = []
    for text in texts:
        tokens = tokenizer(text[:200], return_tensors="pt").input_ids[0][: length()]
        if len(tokens) >= shortest:
            queries.append(tokens)
    return queries


class SentimentScore:
    """Logits for POSITIVE by `transformers`' own pipeline, which reads text, whatever the policy's tokenizer."""

    def __init__(self, classifier: str, batch_size: int = 32) -> None:
        self.pipe = pipeline("sentiment-analysis", model=classifier)
        self.batch_size = batch_size

    def __call__(self, texts: list[str]) -> list[float]:
        results = self.pipe(texts, top_k=None, function_to_apply="none", batch_size=self.batch_size, truncation=True)
        return [next(x["score"] for x in result if x["label"] in ("POSITIVE", "LABEL_1")) for result in results]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(vars(args), default=str, indent=1))

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left", trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(args.model)
    reference = create_reference_model(model)
    score = SentimentScore(args.classifier)

    queries = build_queries(load_texts(args.dataset), tokenizer, *args.query_tokens)
    order = torch.randperm(len(queries)).tolist()
    heldout = [queries[i] for i in order[: args.heldout]]
    dataset = [{"input_ids": queries[i], "query": tokenizer.decode(queries[i])} for i in order[args.heldout :]]

    config = PPOConfig(
        batch_size=args.batch_size,
        mini_batch_size=args.mini_batch_size,
        ppo_epochs=args.ppo_epochs,
        learning_rate=args.learning_rate,
        init_kl_coef=args.init_kl_coef,
        target=args.target_kl_per_sequence,
        steps=args.samples,
        seed=args.seed,
        log_with=args.log_with,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (args.warmup_steps + 1)))
    trainer = PPOTrainer(
        config,
        model,
        reference,
        tokenizer,
        Examples(dataset),
        optimizer=optimizer,
        data_collator=lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
        lr_scheduler=warmup,
    )
    response_length = LengthSampler(args.response_tokens[0], args.response_tokens[1] + 1)
    # Plain sampling: nothing that the log-probabilities of the update do not know of.
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def respond(batch: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[str]]:
        responses = trainer.generate(
            batch, length_sampler=response_length, batch_size=args.batch_size, return_prompt=False, **sampling
        )
        return responses, [tokenizer.decode(r, skip_special_tokens=True) for r in responses]

    def continue_heldout(when: str) -> float:
        set_seed(args.seed + 1)
        texts = [tokenizer.decode(q) for q in heldout]
        _, completions = respond(heldout)
        scores = score([t + c for t, c in zip(texts, completions, strict=True)])
        with open(args.out / "completions.jsonl", "a", encoding="utf-8") as file:
            for query, response, value in zip(texts, completions, scores, strict=True):
                row = {"when": when, "query": query, "response": response, "score": value}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return statistics.mean(scores)

    (args.out / "completions.jsonl").write_text("")
    (args.out / "metrics.jsonl").write_text("")
    print(f"held-out queries before: mean score {continue_heldout('before'):.3f}", flush=True)
    set_seed(args.seed + 2)
    started, samples, step = time.perf_counter(), 0, 0
    steps = args.samples // args.batch_size
    while step < steps:
        for batch in trainer.dataloader:
            marks = [time.perf_counter()]
            responses, batch["response"] = respond(batch["input_ids"])
            marks.append(time.perf_counter())
            scores = score([q + r for q, r in zip(batch["query"], batch["response"], strict=True)])
            marks.append(time.perf_counter())
            rewards = [torch.tensor(value) for value in scores]
            stats = trainer.step(batch["input_ids"], responses, rewards)
            marks.append(time.perf_counter())
            trainer.log_stats(stats, batch, rewards)
            step, samples = step + 1, samples + len(scores)
            row = {
                "step": step,
                "samples": samples,
                "minutes": (marks[-1] - started) / 60,
                "score_mean": statistics.mean(scores),
                "score_median": statistics.median(scores),
                "score_std": statistics.stdev(scores),
                **{name: float(v) for name, v in stats.items() if isinstance(v, float)},
                "time/generate": marks[1] - marks[0],
                "time/score": marks[2] - marks[1],
                "time/step": marks[3] - marks[2],
            }
            with open(args.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"step {step}/{steps}  score {row['score_mean']:+.3f} (median {row['score_median']:+.3f})  "
                f"KL {row['objective/kl']:.2f}  coef {row['objective/kl_coef']:.3f}  "
                f"explained {row['ppo/val/var_explained']:+.2f}  {marks[3] - marks[0]:.1f} s",
                flush=True,
            )
            if step % args.save_every == 0:
                trainer.save_pretrained(args.out / "model")
            if step == steps:
                break
    trainer.save_pretrained(args.out / "model")
    print(f"held-out queries after: mean score {continue_heldout('after'):.3f}", flush=True)


class Examples(torch.utils.data.Dataset):
    """A list as a torch dataset."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


if __name__ == "__main__":
    main()
