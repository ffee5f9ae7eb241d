"""Best-of-n sampling: TRL 0.4.6's contract, any reward, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import BOS, assert_close, tiny_gpt2, tiny_t5, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead as Causal
from trl import AutoModelForSeq2SeqLMWithValueHead as Seq2Seq
from trl.core import LengthSampler
from trl.extras import BestOfNSampler
from trl.functional.best_of_n import best_of_n_curve
from trl.rewards import LengthPenalty, RewardFailed, as_reward

TOKENIZER = tiny_tokenizer()
QUERIES = [[4, 5], [7, 8, 9]]
SAMPLED = GenerationConfig(do_sample=True, top_k=0, min_length=-1, top_p=1.0, pad_token_id=1)


def last_word(texts: list[str]) -> list[float]:
    return [float((text.split() or ["w0"])[-1][1:]) for text in texts]


def make(scorer: Any = last_word, model: Any = None, **arguments: Any) -> BestOfNSampler:
    defaults: dict[str, Any] = {"length_sampler": LengthSampler(2, 6), "generation_config": SAMPLED, "seed": 3}
    model = Causal.from_pretrained(tiny_gpt2()) if model is None else model
    return BestOfNSampler(model, TOKENIZER, scorer, **(defaults | arguments))


@pytest.mark.parametrize(
    ("given", "count"),
    [
        (QUERIES[0], 1),
        (QUERIES, 2),
        (torch.tensor(QUERIES[1]), 1),
        ([torch.tensor(query) for query in QUERIES], 2),
    ],
)
def test_every_form_of_a_query(given: Any, count: int) -> None:
    texts = make().generate(given)
    assert [len(row) for row in texts] == [1] * count
    assert all(text.startswith(("w4 w5 ", "w7 w8 w9 ")) for (text,) in texts)


@pytest.mark.parametrize(("sample_size", "n_candidates"), [(4, 2), (10, 3), (6, 6)])
def test_the_best_come_first(sample_size: int, n_candidates: int) -> None:
    seen: list[list[str]] = []

    def scorer(texts: list[str]) -> list[float]:
        seen.append(texts)
        return last_word(texts)

    best = make(scorer, sample_size=sample_size, n_candidates=n_candidates).generate(QUERIES)
    assert [len(texts) for texts in seen] == [sample_size] * 2  # one call per query
    for texts, sampled in zip(best, seen, strict=True):
        assert texts == sorted(sampled, key=lambda text: -int(text.split()[-1][1:]))[:n_candidates]


def test_one_length_is_drawn_per_query() -> None:
    lengths = iter([2, 5])
    best = make(length_sampler=lambda: next(lengths), sample_size=3).candidates(QUERIES, eos_token_id=None)
    assert [[len(response) for response in row.responses] for row in best] == [[2] * 3, [5] * 3]


def test_samples_are_independent_draws_of_the_model() -> None:
    """Frequencies of the first token against the softmax."""
    row = make(length_sampler=lambda: 1, sample_size=4000).candidates([5, 6])[0]
    counts = torch.stack(row.responses).flatten().bincount(minlength=61) / 4000
    expected = tiny_gpt2()(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.02  # 6 standard deviations at p = 0.05


def test_a_seed_gives_the_same_texts_and_dropout_is_off() -> None:
    model = Causal.from_pretrained(tiny_gpt2(resid_pdrop=0.5)).train()
    first = make(model=model).generate(QUERIES)
    assert make(model=model).generate(QUERIES) == first
    assert make(model=model.eval()).generate(QUERIES) == first
    model.train()
    make(model=model).generate(QUERIES)
    assert model.training


def test_encoder_decoder_returns_responses_alone() -> None:
    best = make(model=Seq2Seq.from_pretrained(tiny_t5()), sample_size=3, length_sampler=lambda: 4).candidates(QUERIES)
    for row in best:
        assert row.texts == row.completions
        assert row.scores == last_word(row.texts) == sorted(row.scores, reverse=True)


def test_any_reward() -> None:
    def shorter(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert set(prompts) == {"w4 w5"}
        return [-float(completion.split()[0][1:]) for completion in completions]

    plain = make(shorter, sample_size=3, n_candidates=3).candidates(QUERIES[0])[0]
    assert [float(c.split()[0][1:]) for c in plain.completions] == [-score for score in plain.scores]
    mixed = make(as_reward({"a": shorter, "b": LengthPenalty(2, per_unit=1.0, most=9.0)}), sample_size=3)
    row = mixed.candidates(QUERIES[0])[0]
    lengths = [max(len(response) - 2, 0) for response in row.responses]
    expected = [-float(c.split()[0][1:]) - n for c, n in zip(row.completions, lengths, strict=True)]
    assert_close(row.scores, expected)
    assert make(LengthPenalty(2)).generate(QUERIES)


def test_special_tokens_are_kept_on_request() -> None:
    sampler = make(length_sampler=lambda: 1)
    (dropped,), (kept,) = (sampler.generate([BOS, 5], skip_special_tokens=skip)[0] for skip in (True, False))
    assert dropped.startswith("w5 ")
    assert kept.startswith("w2 w5 ")


def test_unscored_responses_are_left_out() -> None:
    def only_even(texts: list[str]) -> list[float | None]:
        return [score if int(score) % 2 == 0 else None for score in last_word(texts)]

    row = make(only_even, sample_size=20).candidates(QUERIES[0])[0]
    assert 0 < len(row.scores) < 20
    assert all(score % 2 == 0 for score in row.scores)
    with pytest.raises(ValueError, match=r"query 0: the reward scored only \d+ of 20 responses"):
        make(only_even, sample_size=20, n_candidates=20).generate(QUERIES[0])


def test_generate_samples_what_the_loop_cannot() -> None:
    arguments = {"repetition_penalty": 1.5, "max_new_tokens": 3}
    sampler = make(length_sampler=None, sample_size=3, n_candidates=3)
    best = sampler.generate(QUERIES, **arguments)
    assert best != make(length_sampler=None, sample_size=3, n_candidates=3).generate(QUERIES, max_new_tokens=3)
    assert [len(row) for row in best] == [3, 3]


def test_curve_of_the_scores() -> None:
    rows = make(sample_size=8).candidates(QUERIES)
    curve = best_of_n_curve(torch.tensor([row.scores for row in rows]))
    assert [point.n for point in curve] == [1, 2, 4, 8]
    assert_close(curve[0].score, sum(sum(row.scores) for row in rows) / 16)
    assert_close(curve[-1].score, sum(row.scores[0] for row in rows) / 2)


def test_greedy_samples_are_the_same_and_warned_of() -> None:
    with pytest.warns(UserWarning, match="all 4 responses to a query are the same") as caught:
        best = make(n_candidates=4).generate(QUERIES[0], do_sample=False)
    assert caught[0].filename == __file__
    assert len(set(best[0])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "must be a value-head model or a transformers language model, not Linear"),
        ({"n_candidates": 5}, "n_candidates=5 must be from 1 to sample_size=4"),
        ({"n_candidates": 0}, "n_candidates=0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("query", "arguments", "message"),
    [
        ([], {}, "tokenized_query is empty"),
        ([[]], {}, r"query 0 has shape \[0\]"),
        (torch.tensor(QUERIES[:1]), {}, r"query 0 has shape \[1, 2\]"),
        ([4, 99], {}, "token ids from 4 to 99; the model has 61"),
        ([[5], [4] * 62], {}, r"query_tensor\[1\]: .* would exceed the model's context of 64"),
        (QUERIES, {"max_new_tokens": 3}, "both set the length"),
        (QUERIES, {"device": "meta"}, "device=meta is not the model's, cpu"),
        (QUERIES, {"num_return_sequences": 2}, "num_return_sequences=2 is not supported"),
        (QUERIES, {"temprature": 2.0}, "did you mean temperature"),
    ],
)
def test_bad_queries(query: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(length_sampler=lambda: 3).generate(query, **arguments)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer, not str"):
        BestOfNSampler(Causal.from_pretrained(tiny_gpt2()), str(tmp_path), last_word, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [[float("nan")] * 4, [1.0], None])
def test_a_reward_that_fails(answer: Any) -> None:
    with pytest.raises(RewardFailed):
        make(lambda texts: answer).generate(QUERIES[0])
