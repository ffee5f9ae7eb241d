"""Per-token records: which samples, which numbers, and texts that join up to the completion."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_close, tiny_tokenizer
from tests.trainer.managed import fresh, run
from trl.runs import token_records as module
from trl.runs.token_records import token_records, token_texts
from trl.trackers import read_completions
from trl.types import ActorCritic, Experience, Rollout


def experience(kl: list[float], tokens: int = 3) -> ActorCritic:
    """`len(kl)` sequences of one query token and `tokens` response tokens, with numbers that say where they are from."""
    rows, width = len(kl), tokens + 1
    at = torch.arange(rows * tokens).reshape(rows, tokens).float()
    return ActorCritic(
        rollout=Rollout(
            tokens=torch.arange(3, 3 + width).repeat(rows, 1),
            attention=torch.ones(rows, width, dtype=torch.bool),
            mask=torch.ones(rows, tokens, dtype=torch.bool),
        ),
        scores=torch.zeros(rows),
        old_logprobs=torch.tensor(kl)[:, None].expand(rows, tokens) / tokens,
        ref_logprobs=torch.zeros(rows, tokens),
        advantages=at,
        old_values=at + 100,
        rewards=at + 200,
        non_score_reward=at,
        returns=at,
    )


def test_the_best_the_worst_the_furthest_and_the_first() -> None:
    records = token_records(tiny_tokenizer(), experience([0.0, 1.0, 9.0, 1.0, 1.0]), [None, 1.0, 2.0, 9.0, -5.0])
    assert list(records) == [3, 4, 2, 1]
    assert records[3]["advantage"] == [9.0, 10.0, 11.0]
    assert records[3]["value"] == [109.0, 110.0, 111.0] and records[3]["reward"] == [209.0, 210.0, 211.0]
    assert records[2]["kl"] == [3.0, 3.0, 3.0] and len(records[2]["text"]) == 3
    assert list(token_records(tiny_tokenizer(), experience([0.0, 0.0]), [1.0, 1.0])) == [0]
    assert token_records(tiny_tokenizer(), experience([0.0]), [None]) == {}


def test_only_counted_tokens_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = experience([0.0], tokens=4)
    batch.rollout.mask[0, 1] = False
    record = token_records(tiny_tokenizer(), batch, [1.0])[0]
    assert record["advantage"] == [0.0, 2.0, 3.0] and len(record["text"]) == 3
    monkeypatch.setattr(module, "MAX_TOKENS", 2)
    assert token_records(tiny_tokenizer(), batch, [1.0])[0]["advantage"] == [0.0, 2.0]


def test_an_algorithm_without_critic_and_reference() -> None:
    full = experience([0.0])
    batch = Experience(
        rollout=full.rollout,
        scores=full.scores,
        old_logprobs=full.old_logprobs,
        ref_logprobs=None,
        advantages=full.advantages,
    )
    assert set(token_records(tiny_tokenizer(), batch, [1.0])[0]) == {"text", "advantage"}


class Bytes:
    """A tokenizer of UTF-8 bytes, which writes a space before every token but the first, if it is told to."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Words:
    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_texts_of_tokens_join_up() -> None:
    tokens = list("aé日b".encode())
    assert token_texts(Bytes(), tokens) == ["a", "", "é", "", "", "日", "b"]
    assert token_texts(Bytes(), tokens[:-2]) == ["a", "", "é", "", "�"]
    assert token_texts(Words(), [1, 2, 3]) == ["w1", " w2", " w3"]
    assert token_texts(Words(), []) == []


def test_a_secret_in_a_text_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "w4 w5 w6")
    assert token_records(Words(), experience([0.0]), [1.0]) == {}
    monkeypatch.delenv("SOME_API_KEY")
    assert list(token_records(Words(), experience([0.0]), [1.0])) == [0]


@pytest.mark.parametrize("case", ["plain sgd", "seq2seq"])
def test_a_run_records_them(tmp_path: Path, case: str) -> None:
    trainer = fresh(case)
    result = run(trainer, run_dir=tmp_path / "run", steps=2)
    samples = [s for s in read_completions(tmp_path / "run", 2) if s["tokens"]]
    assert 1 <= len(samples) <= 4
    for sample in samples:
        record = json.loads(sample["tokens"])
        assert {len(values) for values in record.values()} == {sample["length"]}
        assert_close(math.fsum(record["kl"]), sample["kl"], tol=1e-3)
        assert_close(math.fsum(record["advantage"]) / sample["length"], sample["advantage"], tol=1e-3)
    assert result.report() == tmp_path / "run" / "report.html"
    with pytest.raises(ValueError, match="pass run_dir to train"):
        run(fresh(case), steps=1).report()
