"""Data of the pipeline: endings of film reviews for SFT, pairs of a positive and a negative one, and prompts for PPO."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import BestOfNSampler, assets, set_seed
from trl.files import write_atomic
from trl.pretrained import load_model, load_tokenizer
from trl.rewards import ClassifierReward

WORDS = 2  # of a prompt
SHORTEST = 16  # tokens of a text: shorter ones hardly say anything
QUERIES = 8  # prompts in a call of the sampler, which draws all samples of a call as one batch
LONGEST = 10  # sentences of a text


@dataclass(frozen=True)
class TextSettings:
    """Section `data` of the YAML."""

    reviews: str = "data/reviews"
    """Folder with train.jsonl and test.jsonl, whose rows have `text` and `label` (1 is positive): `scripts/fetch_assets.py`."""
    source: str = "auto"
    """"reviews" reads that folder, "sampled" samples from the base model and labels by the judge, "auto" reads it if it exists."""
    max_tokens: int = 100
    """Tokens of a text at most."""
    sft_rows: int = 12_000
    pairs: int = 8_000
    test_pairs: int = 500
    prompts: int = 2_000
    test_prompts: int = 256
    sampled: dict[str, int] = field(default_factory=lambda: {"per_prompt": 64, "max_new_tokens": 48})
    """Of "sampled": responses to each prompt, and their length."""

    def __post_init__(self) -> None:
        if self.source not in ("auto", "reviews", "sampled"):
            raise ValueError(f"data.source={self.source!r} must be auto, reviews or sampled")


@dataclass(frozen=True)
class Text:
    """A text in two parts, and whether it is positive."""

    prompt: str
    completion: str
    positive: bool


@dataclass(frozen=True)
class Data:
    """Files of the pipeline's data, each of JSON lines."""

    folder: Path

    @property
    def sft(self) -> str:
        return str(self.folder / "sft.jsonl")

    @property
    def pairs(self) -> str:
        return str(self.folder / "pairs.jsonl")

    @property
    def test_pairs(self) -> str:
        return str(self.folder / "test_pairs.jsonl")

    @property
    def prompts(self) -> str:
        return str(self.folder / "prompts.jsonl")

    @property
    def test_prompts(self) -> str:
        return str(self.folder / "test_prompts.jsonl")

    def write(self, settings: TextSettings, *, base: str, judge: str, seed: int) -> dict[str, Any]:
        """Writes all files; returns the source of the texts and the number of rows by file."""
        folder = Path(settings.reviews)
        source = settings.source
        if source == "auto":
            source = "reviews" if (folder / "train.jsonl").is_file() else "sampled"
            if source == "sampled":
                print(
                    f"{folder} has no train.jsonl: texts are sampled from the base model and labelled by the judge",
                    flush=True,
                )
        if source == "reviews":
            train, test = (
                list(endings(folder / f"{part}.jsonl", settings.max_tokens, base)) for part in ("train", "test")
            )
        else:
            train, test = sampled_texts(settings, base=base, judge=judge, seed=seed)
        shuffle = random.Random(seed).shuffle
        shuffle(train)
        shuffle(test)
        known = {text.prompt for text in train}
        openings, new = sorted(known), sorted({text.prompt for text in test} - known)
        shuffle(openings)
        shuffle(new)
        rows: dict[str, list[dict[str, str]]] = {
            self.sft: [{"prompt": t.prompt, "completion": t.completion} for t in train[: settings.sft_rows]],
            self.pairs: pairs(train)[: settings.pairs],
            self.test_pairs: pairs(test)[: settings.test_pairs],
            self.prompts: [{"prompt": prompt} for prompt in openings[: settings.prompts]],
            self.test_prompts: [{"prompt": prompt} for prompt in new[: settings.test_prompts]],
        }
        for path, part in rows.items():
            if not part:
                raise ValueError(
                    f"no rows for {path}: the texts are too few; raise data.max_tokens or data.sampled.per_prompt"
                )
            shuffle(part)
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in part).encode())
        return {"source": source, "rows": {Path(path).stem: len(part) for path, part in rows.items()}}


def endings(path: Path, max_tokens: int, model: str) -> Iterator[Text]:
    """Yields the last sentences of each review, as many as fit: there a reviewer sums up."""
    tokenizer = load_tokenizer(model)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # Rotten Tomatoes' single sentences in lower case are unlike anything that the base model writes.
    rows = [row for row in rows if row.get("source") != "rotten_tomatoes"]
    ends = [re.split(r"(?<=[.!?])\s+", row["text"].replace("<br />", " ").strip())[-LONGEST:] for row in rows]
    lengths = iter(tokenizer([f" {sentence}" for end in ends for sentence in end]).input_ids)
    for row, sentences in zip(rows, ends, strict=True):
        tokens = [len(next(lengths)) for _ in sentences]
        first = len(sentences)
        while first and sum(tokens[first - 1 :]) <= max_tokens:
            first -= 1
        words = " ".join(sentences[first:]).split()
        if len(words) > 2 * WORDS and sum(tokens[first:]) >= SHORTEST:
            yield split_text(words, WORDS, row["label"] == 1)


def split_text(words: Sequence[str], number: int, positive: bool) -> Text:
    """Returns a text whose prompt is its first words."""
    return Text(" ".join(words[:number]), " " + " ".join(words[number:]), positive)


def pairs(texts: Iterable[Text]) -> list[dict[str, str]]:
    """Pairs each positive text with a negative one that begins with the same words: the same prompt, or else its first word."""
    rows = []
    left = list(texts)
    for number in (WORDS, 1):
        groups: dict[str, tuple[list[Text], list[Text]]] = defaultdict(lambda: ([], []))
        for text in left:
            words = (text.prompt + text.completion).split()
            cut = split_text(words, number, text.positive) if number < WORDS else text
            groups[cut.prompt][text.positive].append(cut)
        left = []
        for prompt, (negative, positive) in groups.items():
            for bad, good in zip(negative, positive, strict=False):
                rows.append({"prompt": prompt, "chosen": good.completion, "rejected": bad.completion})
            shared = min(len(negative), len(positive))
            left += negative[shared:] + positive[shared:]
    return rows


def sampled_texts(settings: TextSettings, *, base: str, judge: str, seed: int) -> tuple[list[Text], list[Text]]:
    """Samples texts from the base model; the judge calls the better half of a prompt's positive, the other half negative."""
    from transformers import AutoModelForCausalLM

    set_seed(seed)
    tokenizer = load_tokenizer(base)
    model = load_model(AutoModelForCausalLM, base)
    number, length = settings.sampled["per_prompt"], settings.sampled["max_new_tokens"]
    sampler = BestOfNSampler(
        model, tokenizer, ClassifierReward.from_pretrained(judge), lambda: length, sample_size=number
    )
    prompts = assets.prompts()
    random.Random(0).shuffle(prompts)
    texts: list[list[Text]] = []
    for start in range(0, len(prompts), QUERIES):
        queries = tokenizer(prompts[start : start + QUERIES]).input_ids
        batch = sampler.candidates(queries, do_sample=True, top_k=0)
        for prompt, candidates in zip(prompts[start : start + QUERIES], batch, strict=True):
            completions = [completion for completion in candidates.completions if completion.strip()]
            half = len(completions) // 2
            texts.append([Text(prompt, completion, i < half) for i, completion in enumerate(completions)])
    held_out = max(1, len(texts) // 4)
    return [t for part in texts[held_out:] for t in part], [t for part in texts[:held_out] for t in part]
