"""Summaries by an encoder-decoder: SFT on reference summaries, then PPO on the overlap with them.

A summary is the words of a review that praise or blame: those that the judge scores furthest from neutral when it reads them alone.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages import FromYaml, Stages, interval, named
from texts import endings, sampled_texts
from transformers import T5Config, T5ForConditionalGeneration

from trl import AutoModelForSeq2SeqLMWithValueHead, PPOTrainer, SFTTrainer, set_seed
from trl.files import write_atomic
from trl.pretrained import load_tokenizer
from trl.rewards import ClassifierReward

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
COMMON = 5  # texts that a word of the lexicon is in, at least
FILES = ("sft", "prompts", "test")


@dataclass(frozen=True)
class SummarySettings(FromYaml):
    """The YAML file."""

    base: str
    """Its tokenizer is the summariser's; it writes the texts where there are no reviews."""
    judge: str
    sft: dict[str, Any]
    ppo: dict[str, Any]
    model: dict[str, Any]
    """`T5Config` of the summariser, which begins with random weights."""
    data: dict[str, Any] = field(default_factory=dict)
    lexicon: int = 200
    """Number of words that summaries are made of."""
    most: int = 4
    """Words of a summary at most."""
    max_new_tokens: int = 12


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return WORD.findall(text.lower())


def overlap(prompts: Sequence[str], completions: Sequence[str], summary: Sequence[str]) -> list[float]:
    """The reward: F1 of a summary's words and those of the reference (ROUGE-1 of Lin 2004)."""
    scores = []
    for completion, reference in zip(completions, summary, strict=True):
        mine, theirs = Counter(words(completion)), Counter(words(reference))
        scores.append(2 * sum((mine & theirs).values()) / max(1, mine.total() + theirs.total()))
    return scores


@dataclass(frozen=True)
class Summaries(Stages):
    """From texts to a summariser: SFT, PPO, and both judged on texts that neither saw."""

    settings: SummarySettings

    def __post_init__(self) -> None:
        """Makes the settings of every stage, so that a wrong one is an error before the first stage."""
        self.texts, self.sft_config, self.ppo_config, T5Config(**self.settings.model)

    @property
    def stages(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The stages in their order: each returns what its result.json says."""
        return {"data": self.prepare, "sft": self.sft, "ppo": self.ppo, "judged": self.judge}

    def file(self, name: str) -> str:
        """Returns the path of a file of the data."""
        return str(self.root / "data" / f"{name}.jsonl")

    def prepare(self) -> dict[str, Any]:
        """Writes the texts with their reference summaries."""
        settings, seed = self.texts, self.seed
        base, judge = named(self.settings.base), named(self.settings.judge)
        folder = Path(settings.reviews)
        source = settings.source
        if source == "auto":
            source = "reviews" if (folder / "train.jsonl").is_file() else "sampled"
        if source == "reviews":
            parts = [list(endings(folder / f"{name}.jsonl", settings.max_tokens, base)) for name in ("train", "test")]
        else:
            parts = list(sampled_texts(settings, base=base, judge=judge, seed=seed))
        train, test = ([text.prompt + text.completion for text in part] for part in parts)
        shuffle = random.Random(seed).shuffle
        shuffle(train)
        shuffle(test)
        train, test = train[: settings.sft_rows], test[: 4 * settings.test_prompts]
        lexicon = self.lexicon(train, judge)
        summarised = [[(t, s) for t in part if (s := self.summary(t, lexicon))] for part in (train, test)]
        sft = [{"prompt": text, "completion": f" {summary}"} for text, summary in summarised[0]]
        prompts, held_out = ([{"prompt": t, "summary": s} for t, s in part] for part in summarised)
        rows = dict(zip(FILES, (sft, prompts[: settings.prompts], held_out[: settings.test_prompts]), strict=True))
        for name, part in rows.items():
            if not part:
                raise ValueError(f"no rows for {name}: no text has a word of the lexicon; raise lexicon, or the texts")
            write_atomic(self.file(name), "".join(json.dumps(row) + "\n" for row in part).encode())
        return {"source": source, "rows": {name: len(part) for name, part in rows.items()}, "lexicon": sorted(lexicon)}

    def lexicon(self, texts: Sequence[str], judge: str) -> set[str]:
        """Returns the words that the judge finds furthest from neutral, of those that several texts have."""
        counts = Counter(word for text in texts for word in set(words(text)))
        common = sorted(word for word, count in counts.items() if count >= COMMON)
        scores = ClassifierReward.from_pretrained(judge, output="probability")([""] * len(common), common)
        ranked = sorted(zip(scores, common, strict=True), key=lambda pair: (-abs(pair[0] - 0.5), pair[1]))
        return {word for _, word in ranked[: self.settings.lexicon]}

    def summary(self, text: str, lexicon: set[str]) -> str:
        """Returns the first words of a text that are in the lexicon, each once."""
        return " ".join([word for word in dict.fromkeys(words(text)) if word in lexicon][: self.settings.most])

    def sft(self) -> dict[str, Any]:
        """Trains a new encoder-decoder on the reference summaries."""
        tokenizer = load_tokenizer(named(self.settings.base))
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        special = dict.fromkeys(names, tokenizer.eos_token_id) | {"vocab_size": len(tokenizer)}
        set_seed(self.seed)
        model = T5ForConditionalGeneration(T5Config(**special | self.settings.model))
        trainer = SFTTrainer(model, self.sft_config, train_dataset=self.file("sft"), processing_class=tokenizer)
        return self.finish(trainer, "sft")

    def ppo(self) -> dict[str, Any]:
        """Trains the SFT model with PPO on the overlap of its summaries with the references."""
        return self.climb(self.ppo_trainer(self.model("sft")), self.file("prompts"), overlap)

    def judge(self) -> dict[str, Any]:
        """Compares PPO with the SFT model on held-out texts: by the reward, and by how well summaries keep the tone."""
        judge = ClassifierReward.from_pretrained(named(self.settings.judge), output="probability")

        def tone_kept(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            """1 minus the distance of the summary's probability of being positive from the text's."""
            none = [""] * len(prompts)
            pairs = zip(judge(none, prompts), judge(none, [text or " " for text in completions]), strict=True)
            return [1 - abs(text - summary) for text, summary in pairs]

        trainer = self.ppo_trainer(self.model("ppo"))
        return {
            name: trainer.evaluate(self.file("test"), score, generation=self.generation, seed=self.seed).to_dict()
            for name, score in (("overlap", overlap), ("tone", tone_kept))
        }

    def ppo_trainer(self, folder: str) -> PPOTrainer:
        """Returns a trainer of a summariser whose reference is the SFT model."""
        set_seed(self.seed)  # of the value head
        policy, reference = (
            AutoModelForSeq2SeqLMWithValueHead.from_pretrained(each) for each in (folder, self.model("sft"))
        )
        return PPOTrainer(self.ppo_config, policy, reference, load_tokenizer(self.model("sft")))

    def table(self, results: dict[str, Any]) -> str:
        """Returns the table at the end, in Markdown."""
        rows, judged = results["data"]["rows"], results["judged"]
        lines = [
            f"Texts: {results['data']['source']}; {rows['sft']} with a reference summary, {rows['test']} held out. KL of PPO to "
            f"the SFT model: {interval(judged['overlap']['kl'], '.2f')} nats per summary.",
            "",
            "| held out, mean | PPO | SFT model | difference | win rate |",
            "| --- | --- | --- | --- | --- |",
        ]
        for key, name in {"overlap": "overlap with the reference (the reward)", "tone": "tone kept"}.items():
            row = judged[key]
            means = [interval(row[side]["score"], ".3f") for side in ("trained", "base")]
            lines.append(
                f"| {name} | {' | '.join(means)} | {interval(row['difference'], '+.3f')} | {interval(row['win_rate'], '.1%')} |"
            )
        return "\n".join(lines) + "\n"
