"""Our own decoding loop: the same tokens as `generate`, whatever the batch, and what it records is what scoring finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.zoo import DRIVEN, ZOO, Architecture, everyday, sharp
from trl.kernels.products import bucket_size
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, evaluate
from trl.rollout import LocalEngine, decoders, rollout_rows, sample
from trl.types import Rollout, Sampling

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [8, 9, 10, 11, 12], [40])]


def numbers(longest: int, count: int, seed: int = 0) -> Tensor:
    return torch.rand(longest, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", everyday(DRIVEN))
def test_greedy_tokens_are_those_of_generate(architecture: Architecture) -> None:
    model = sharp(architecture)
    model.generation_config.num_beams = 1  # FSMT's default is a beam search
    limits = [6, 4, 6, 3, 1]
    got = sample(model, QUERIES, sampling=Sampling(greedy=True), limits=limits, uniforms=numbers(6, 5)).responses
    for query, response, limit in zip(QUERIES, got, limits, strict=True):
        alone = model.generate(
            query[None], attention_mask=torch.ones(1, len(query), dtype=torch.long), do_sample=False,
            max_new_tokens=limit, eos_token_id=None,
        )[0]  # fmt: skip
        assert torch.equal(response, alone[1:] if architecture.encoder_decoder else alone[len(query) :])


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama], ids=["gpt2", "dynamic llama"])
def test_a_row_that_has_ended_does_not_pass_the_context(build: Any) -> None:
    """It stays in the batch: GPT-2 has no embedding there, and dynamic frequencies are those of the longest row."""
    settings: dict[str, Any] = {"initializer_range": 0.5}
    if build is tiny_llama:
        settings["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10.0}
    model, words = build(**settings), torch.Generator().manual_seed(0)
    queries = [torch.randint(3, 61, (length,), generator=words) for length in (60, *[4] * 7)]
    limits = [4, *[56] * 7]  # of 64 positions
    got = sample(model, queries, sampling=Sampling(greedy=True), limits=limits, uniforms=numbers(56, 8)).responses
    for query, response, limit in zip(queries, got, limits, strict=True):
        alone = model.generate(
            query[None], attention_mask=torch.ones(1, len(query), dtype=torch.long), do_sample=False,
            max_new_tokens=limit, eos_token_id=None,
        )[0]  # fmt: skip
        assert torch.equal(response, alone[len(query) :])


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_response_does_not_depend_on_its_batch(seq2seq: bool) -> None:
    model = tiny_t5() if seq2seq else tiny_gpt2()
    limits, table = [6, 9, 3, 9, 7], numbers(9, 5)
    settings = {"sampling": Sampling(stops=(1, 7, 20, 33, 45)), "limits": limits}
    together = sample(model, QUERIES, uniforms=table, **settings)
    for row, query in enumerate(QUERIES):
        alone = sample(model, [query], sampling=settings["sampling"], limits=[limits[row]], uniforms=table[:, [row]])
        assert torch.equal(alone.responses[0], together.responses[row])
        assert_close(together.logprobs[row], alone.logprobs[0])


def test_stop_tokens_and_limits_end_a_response() -> None:
    stops = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
    limits = [30] * 40
    queries = [torch.tensor([21 + i]) for i in range(40)]
    got = sample(
        tiny_gpt2(), queries, sampling=Sampling(stops=stops), limits=limits, uniforms=numbers(30, 40)
    ).responses
    assert len({len(r) for r in got}) > 3  # some ended early, at different places
    for response in got:
        assert not set(response[:-1].tolist()) & set(stops)
        assert int(response[-1]) in stops or len(response) == 30


def test_rows_leave_in_groups_of_sizes_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    keep = decoders.CausalDecoder.keep
    monkeypatch.setattr(decoders.CausalDecoder, "keep", lambda self, rows: sizes.append(len(rows)) or keep(self, rows))
    limits = list(range(1, 42))
    queries = [torch.tensor([7 + i]) for i in range(41)]
    got = sample(tiny_gpt2(), queries, sampling=Sampling(), limits=limits, uniforms=numbers(41, 41))
    assert [len(r) for r in got.responses] == limits
    assert len(sizes) > 4
    assert all(size == bucket_size(size, steps=4) for size in sizes)
    alone = sample(tiny_gpt2(), queries[30:31], sampling=Sampling(), limits=[31], uniforms=numbers(41, 41)[:31, [30]])
    assert torch.equal(alone.responses[0], got.responses[30])


def test_no_stop_token_before_the_least_length() -> None:
    stops = tuple(range(3, 61))
    sampling = Sampling(stops=stops, least_tokens=4)
    got = sample(tiny_gpt2(), QUERIES, sampling=sampling, limits=[9] * 5, uniforms=numbers(9, 5)).responses
    assert all(len(r) > 4 and set(r[:4].tolist()) <= {0, 1, 2} for r in got)


@pytest.mark.conformance
@pytest.mark.parametrize("seq2seq", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_02_recorded_logprobs_and_values_are_those_of_scoring(seq2seq: bool, temperature: float) -> None:
    auto = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    wrapper = auto.from_pretrained(tiny_t5() if seq2seq else tiny_gpt2(), summary_dropout_prob=0.0).eval()
    sampling = Sampling(temperature=temperature, stops=(7, 20, 33))
    with wrapper.watch_values() as values:
        got = sample(
            wrapper.pretrained_model, QUERIES, sampling=sampling, limits=[8] * 5, uniforms=numbers(8, 5), values=values
        )
    assert got.values is not None
    for query, response, logprobs, critic in zip(QUERIES, got.responses, got.logprobs, got.values, strict=True):
        before = torch.tensor([0]) if seq2seq else query
        tokens = torch.cat([before, response])[None]
        ones = torch.ones_like(tokens, dtype=torch.bool)
        rollout = Rollout(tokens=tokens, attention=ones, mask=ones[:, 1:])
        if seq2seq:
            rollout = Rollout(
                tokens=tokens, attention=ones, mask=ones[:, 1:], encoder_tokens=query[None],
                encoder_attention=torch.ones(1, len(query), dtype=torch.bool),
            )  # fmt: skip
        with torch.no_grad():
            scored = evaluate(wrapper, rollout, temperature=temperature)
        assert scored.values is not None
        assert_close(logprobs, scored.logprobs[0, len(before) - 1 :])
        assert_close(critic, scored.values[0, len(before) - 1 :])


@pytest.mark.conformance
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.6}])
def test_04_logprobs_are_of_the_distribution_that_was_sampled_from(cut: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model = tiny_gpt2(initializer_range=0.5)
    got = sample(model, QUERIES, sampling=Sampling(**cut), limits=[6] * 5, uniforms=numbers(6, 5))
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    ((name, value),) = cut.items()
    for query, response, logprobs in zip(QUERIES, got.responses, got.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        expected = warpers[name](value)(None, logits).log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)
        assert_close(logprobs, expected)
        assert (logprobs > logits.log_softmax(-1).gather(-1, response[:, None]).squeeze(-1)).any()


@pytest.mark.conformance
@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 8}, {"top_p": 0.6}, {"min_p": 0.4}], ids=lambda cut: "-".join(cut) or "plain"
)
def test_04_first_tokens_follow_the_exact_probabilities(cut: dict[str, Any]) -> None:
    """Chi-square of 4,000 first tokens through the whole loop; the limit is passed once in 30,000 times."""
    from tests.functional.test_sampling import chi_square_limit
    from trl.functional.sampling import cut_logits

    model, count = tiny_gpt2(initializer_range=0.5), 4000
    query = torch.tensor([5, 6, 7])
    got = sample(model, [query] * count, sampling=Sampling(**cut), limits=[1] * count, uniforms=numbers(1, count))
    seen = torch.bincount(torch.cat(got.responses), minlength=61).double()
    with torch.no_grad():
        p = cut_logits(model(query[None]).logits[0, -1], **cut).double().softmax(-1)
    assert (seen[p == 0] == 0).all()
    common = p * count >= 5
    parts = (seen - p * count)[common] ** 2 / (p * count)[common]
    assert float(parts.sum()) < chi_square_limit(max(1, int(common.sum()) - 1))


def responses_of(limits: list[int], batch_size: int = 5) -> list[Tensor]:
    engine = LocalEngine(tiny_gpt2(), batch_size=batch_size)
    return rollout_rows(engine.generate(QUERIES, Sampling(limits=tuple(limits), seed=3)))[1]


def test_batch_size_changes_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.rollout.local._SPARE_MEMORY", 0)  # no more rows than were asked for
    runs = [responses_of([7] * 5, batch_size=size) for size in (1, 2, 5)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def from_zoo(name: str) -> Callable[[], Any]:
    return next(architecture for architecture in ZOO if architecture.name == name).build


@pytest.mark.parametrize(
    ("build", "per_token", "vocabulary"),
    [
        # Bytes: keys and values of 2 layers x heads x their width x the size of a number.
        pytest.param(tiny_gpt2, 2 * 2 * 2 * 8 * 4, 61, id="GPT-2"),
        pytest.param(lambda: tiny_gpt2().bfloat16(), 2 * 2 * 2 * 8 * 2, 61, id="GPT-2 in bfloat16"),
        pytest.param(tiny_llama, 2 * 2 * 1 * 8 * 4, 61, id="Llama: 2 heads share keys"),
        pytest.param(tiny_t5, 2 * 2 * 2 * 8 * 4, 61, id="T5"),
        pytest.param(lambda: tiny_t5(num_decoder_layers=1), 2 * 1 * 2 * 8 * 4, 61, id="T5 with 1 decoder layer"),
        pytest.param(from_zoo("Gemma 4 (text)"), 2 * (1 * 8 + 2 * 16) * 4, 64, id="Gemma 4: layers differ"),
        pytest.param(from_zoo("Gemma 4 E (text)"), 2 * (1 * 8 + 2 * 16) * 4, 64, id="Gemma 4 E: 2 of 4 layers cache"),
        pytest.param(from_zoo("Laguna"), 2 * 2 * 1 * 8 * 4, 64, id="Laguna: query heads differ"),
    ],
)
def test_batches_grow_to_the_spare_memory(
    build: Callable[[], Any], per_token: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = per_token * (5 + 7) + 16 * vocabulary  # the longest query and 7 new tokens; logits
    sizes: list[int] = []
    monkeypatch.setattr(
        "trl.rollout.local.sample",
        lambda model, queries, **more: sizes.append(len(queries)) or sample(model, queries, **more),
    )
    engine = LocalEngine(build(), batch_size=1)
    for spare in (3 * row - 1, 3 * row):
        monkeypatch.setattr("trl.rollout.local._SPARE_MEMORY", spare)
        engine.generate(QUERIES, Sampling(limits=(7,) * 5, seed=0))
    assert sizes == [2, 2, 1, 3, 2]


def test_the_size_of_a_row_is_measured_once() -> None:
    model, passes = tiny_gpt2(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for _ in range(2):
        passes.clear()
        LocalEngine(model).generate(QUERIES, Sampling(limits=(3,) * 5))
        counts.append(len(passes))
    assert counts == [4, 3]


def test_a_longer_limit_changes_no_token_before_it() -> None:
    short, long = (responses_of([n] * 5) for n in (3, 9))
    assert all(torch.equal(a, b[:3]) for a, b in zip(short, long, strict=True))


def test_without_a_seed_torch_s_own_numbers_are_drawn() -> None:
    engine = LocalEngine(tiny_gpt2())  # building a tiny model sets the seed
    runs = []
    for seed in (7, 7, None):
        if seed is not None:
            torch.manual_seed(seed)
        runs.append(engine.generate(QUERIES, Sampling(limits=(7,) * 5)).tokens)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[1], runs[2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_rollout_holds_what_was_sampled_and_what_was_seen(seq2seq: bool, side: Any) -> None:
    """Row by row what `sample` records, which is compared with scoring above."""
    auto = AutoModelForSeq2SeqLMWithValueHead if seq2seq else AutoModelForCausalLMWithValueHead
    wrapper = auto.from_pretrained(tiny_t5() if seq2seq else tiny_gpt2(), summary_dropout_prob=0.0).eval()
    model, limits, pad = wrapper.pretrained_model, (4, 8, 2, 8, 5), 60
    engine = LocalEngine(model, pad_token=pad, side=side, batch_size=2, critic=wrapper.watch_values)
    engine.update_weights(6)
    rollout = engine.generate(QUERIES, Sampling(limits=limits, seed=1, stops=(7, 20, 33)))
    with wrapper.watch_values() as values:
        expected = sample(
            model,
            QUERIES,
            sampling=Sampling(stops=(7, 20, 33)),
            limits=limits,
            uniforms=numbers(8, 5, 1),
            values=values,
        )
    assert rollout.policy_version == 6 and rollout.group[1] == rollout.group[3] and len(rollout.group.unique()) == 4
    assert (rollout.tokens[~rollout.attention] == pad).all()
    assert rollout.attention[:, 0 if side == "right" else -1].all()
    assert rollout.sampler_logprobs is not None and rollout.values is not None and expected.values is not None
    for row, query in enumerate(QUERIES):
        before = torch.tensor([0]) if seq2seq else query
        sampled = rollout.mask[row]
        assert rollout.tokens[row][rollout.attention[row]].tolist() == [
            *before.tolist(),
            *expected.responses[row].tolist(),
        ]
        assert rollout.tokens[row, 1:][sampled].tolist() == expected.responses[row].tolist()
        assert_close(rollout.sampler_logprobs[row][sampled], expected.logprobs[row])
        assert_close(rollout.values[row][sampled], expected.values[row])
        if seq2seq:
            assert rollout.encoder_tokens is not None and rollout.encoder_attention is not None
            assert rollout.encoder_tokens[row][rollout.encoder_attention[row]].tolist() == query.tolist()
    assert LocalEngine(model).generate(QUERIES, Sampling(limits=limits)).values is None


@pytest.mark.parametrize(
    ("limits", "problem"),
    [((4, 4, 0, 4, 4), "contains 0; every response needs at least 1"), ((4, 4), "has 2 entries for 5 queries")],
)
def test_limits_are_checked(limits: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LocalEngine(tiny_gpt2()).generate(QUERIES, Sampling(limits=limits))
