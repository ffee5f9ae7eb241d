"""SmolLM2, MiniLM and real reviews: what tiny models cannot show. `make real`.

The folders are made by scripts/fetch_assets.py and scripts/train_classifier.py, under $TRL_ASSETS or data/.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_close
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.models import evaluate
from trl.rewards import ClassifierReward
from trl.types import Rollout

pytestmark = pytest.mark.real

ROOT = Path(os.environ.get("TRL_ASSETS", "data"))


def folder(name: str) -> Path:
    """A part of the assets; the test is skipped where it was not made."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{path} is missing: run scripts/fetch_assets.py and scripts/train_classifier.py")
    return path


@pytest.fixture(scope="module")
def smollm() -> Any:
    from transformers import AutoTokenizer

    path = folder("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    return AutoModelForCausalLMWithValueHead.from_pretrained(path, summary_dropout_prob=0.0).eval(), tokenizer


def padded(rows: list[torch.Tensor], side: str) -> Rollout:
    """A rollout of whole rows, each token after the first a response token."""
    width = max(len(row) for row in rows)
    tokens, attention = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where], attention[i, where] = row, True
    return Rollout(tokens=tokens, attention=attention, mask=attention[:, 1:] & attention[:, :-1])


def test_padding_sides_agree_on_a_real_model(smollm: Any) -> None:
    model, tokenizer = smollm
    texts = ["This movie was the best I have seen in years.", "I left after ten minutes", "Why?"]
    rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    with torch.no_grad():
        found = []
        for side in ("left", "right"):
            rollout = padded(rows, side)
            result = evaluate(model, rollout, entropy=True)
            found.append([x[rollout.mask] for x in (result.logprobs, result.values, result.entropy)])
    for left, right in zip(*found, strict=True):
        assert_close(left, right, 1e-4)


def test_sampling_and_scoring_agree_on_a_real_model(smollm: Any) -> None:
    """CONFORMANCE 2 at full size: the logprobs seen while sampling are those of scoring, at temperature 0.7."""
    model, tokenizer = smollm
    prompt = tokenizer("The acting in this film", return_tensors="pt").input_ids
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, temperature=0.7,
        max_new_tokens=12, eos_token_id=None, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    response = out.sequences[0, prompt.shape[1] :]
    seen = torch.stack([torch.log_softmax(s[0].float(), -1)[t] for s, t in zip(out.scores, response, strict=True)])
    with torch.no_grad():
        scored = evaluate(model, padded([out.sequences[0]], "right"), temperature=0.7).logprobs[
            0, prompt.shape[1] - 1 :
        ]
    assert_close(scored, seen, 1e-4)


def test_one_step_on_a_real_model(smollm: Any) -> None:
    model, tokenizer = smollm
    trainer = PPOTrainer(
        PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-6), model, None, tokenizer
    )
    queries = [tokenizer(t, return_tensors="pt").input_ids[0] for t in ("This film is", "I")]
    responses = trainer.generate(queries, return_prompt=False, do_sample=True, top_k=0, max_new_tokens=8)
    stats = trainer.step(queries, list(responses), [torch.tensor(1.0), torch.tensor(-1.0)])
    assert abs(stats["objective/kl"]) < 1e-3
    assert_close(
        stats["ppo/policy/ratio"][stats["ppo/policy/advantages"] != 0],
        1.0 + 0 * stats["ppo/policy/ratio"][stats["ppo/policy/advantages"] != 0],
        1e-3,
    )
    assert 0 < stats["ppo/policy/entropy"] < 11  # log 49,152 = 10.8


def test_the_classifier_reads_reviews(smollm: Any) -> None:
    """At least 88% of held-out reviews and 78% of their 30-word openings; a sample here, all in its metrics.json."""
    reward = ClassifierReward.from_pretrained(str(folder("sentiment-minilm")))
    lines = (folder("reviews") / "test.jsonl").read_text(encoding="utf-8").splitlines()
    reviews = [row for row in map(json.loads, lines) if row["source"] == "imdb"][:400]
    labels = torch.tensor([row["label"] for row in reviews])
    for words, least in ((None, 0.85), (30, 0.74)):  # three standard errors of 400 reviews below the bounds
        texts = [" ".join(row["text"].split()[:words]) for row in reviews]
        positive = torch.tensor(reward([""] * len(texts), texts)) > 0
        negative = torch.tensor(
            ClassifierReward(reward.model, reward.tokenizer, label="NEGATIVE")([""] * len(texts), texts)
        )
        margin = torch.tensor(reward([""] * len(texts), texts)) - negative
        assert positive.float().mean() > 0.2
        assert ((margin > 0).long() == labels).float().mean() > least
