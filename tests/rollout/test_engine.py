"""Our own decoding loop: the same tokens as `generate`, whatever the batch, and what it records is what scoring finds."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5, with_cache_called
from tests.models.zoo import ZOO, Architecture
from tests.trainer.conftest import make_trainer  # noqa: F401  (fixture)
from trl.kernels.kv_cache import GrowingLayer, growing_cache
from trl.kernels.products import shared_size
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, evaluate
from trl.rollout import Sampling, engine, obstacle, own_sampling, sample, sample_responses
from trl.types import Rollout

DRIVEN = [a for a in ZOO if "Mamba" not in a.name and a.name != "ProphetNet"]
QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [8, 9, 10, 11, 12], [40])]


def sharp(architecture: Architecture) -> Any:
    """The model with larger matrices: at its initial size attention is nearly uniform, and hides a wrong position."""
    model = architecture.build()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def numbers(longest: int, count: int, seed: int = 0) -> Tensor:
    return torch.rand(longest, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", DRIVEN, ids=lambda a: a.name)
def test_nothing_stands_against_it(architecture: Architecture) -> None:
    assert obstacle(sharp(architecture)) is None


@pytest.mark.parametrize("architecture", [a for a in ZOO if "Mamba" in a.name], ids=lambda a: a.name)
def test_a_state_space_model_is_left_to_generate(architecture: Architecture) -> None:
    assert "keeps its state in another way" in (obstacle(architecture.build()) or "")


def test_a_model_that_is_not_causal_is_found_out() -> None:
    """In ProphetNet's forward pass what a token is predicted from includes tokens after it: docs/models.md, Limits."""
    (architecture,) = (a for a in ZOO if a.name == "ProphetNet")
    model = sharp(architecture)
    assert "off its own forward pass" in (obstacle(model) or "")
    written = torch.tensor([[2, 9, 10, 11, 12]])
    with torch.no_grad():
        whole, beginning = (
            model(input_ids=QUERIES[1][None], decoder_input_ids=written[:, :n]).logits[0, :3] for n in (5, 3)
        )
    assert (whole - beginning).abs().max() > 0.01


@pytest.mark.parametrize("architecture", DRIVEN, ids=lambda a: a.name)
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


@pytest.mark.parametrize("broken", ["positions", "mask"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_a_loop_that_is_wrong_is_found_out(build: Any, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(initializer_range=0.5)
    forward = model.forward.__func__

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if broken == "positions" and kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None].expand_as(kwargs["input_ids"])
        if broken == "mask":
            kwargs["attention_mask"] = None
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(model, "forward", wrong)
    assert "off its own forward pass" in (obstacle(model) or "")


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_forward_has_for_it(keyword: str) -> None:
    model, seen = with_cache_called(keyword, tiny_gpt2())
    assert obstacle(model) is None
    assert sum(cache is not None for cache in seen) == 4  # queries and three tokens; the plain passes have none


def test_a_model_that_cannot_be_decoded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no cache here")

    monkeypatch.setattr(model, "forward", fails)
    assert "RuntimeError: no cache here" in (obstacle(model) or "")


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
    keep = engine._CausalDecoder.keep
    monkeypatch.setattr(engine._CausalDecoder, "keep", lambda self, rows: sizes.append(len(rows)) or keep(self, rows))
    limits = list(range(1, 42))
    queries = [torch.tensor([7 + i]) for i in range(41)]
    got = sample(tiny_gpt2(), queries, sampling=Sampling(), limits=limits, uniforms=numbers(41, 41))
    assert [len(r) for r in got.responses] == limits
    assert len(sizes) > 4
    assert all(size == shared_size(size, steps=4) for size in sizes)
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


def test_batch_size_changes_no_response() -> None:
    model = tiny_gpt2()
    runs = [
        sample_responses(
            model, QUERIES, sampling=Sampling(), limits=[7] * 5, batch_size=size,
            generator=torch.Generator().manual_seed(3),
        ).responses
        for size in (1, 2, 5)
    ]  # fmt: skip
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_a_longer_limit_changes_no_token_before_it() -> None:
    short, long = (
        sample_responses(
            tiny_gpt2(), QUERIES, sampling=Sampling(), limits=[n] * 5, batch_size=5,
            generator=torch.Generator().manual_seed(3),
        ).responses
        for n in (3, 9)
    )  # fmt: skip
    assert all(torch.equal(a, b[:3]) for a, b in zip(short, long, strict=True))


def test_lengths_are_drawn_once_per_batch(make_trainer: Any) -> None:  # noqa: F811
    for own in ({}, {"num_beams": 2}):  # our own loop; generate
        got = make_trainer().generate(
            QUERIES,
            iter([3, 6, 1]).__next__,
            batch_size=2,
            return_prompt=False,
            do_sample=False,
            eos_token_id=None,
            **own,
        )
        assert [len(r) for r in got] == [3, 3, 6, 6, 1]


def test_an_empty_response_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="at most 0 new tokens"):
        sample_responses(
            tiny_gpt2(), QUERIES, sampling=Sampling(), limits=[4, 4, 0, 4, 4], batch_size=2, generator=torch.Generator(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"min_length": 5}, "min_length=5 counts the padding"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"num_return_sequences": 3}, "num_return_sequences=3"),
        ({"streamer": object()}, "streamer is a setting that only generate knows"),
        ({"max_new_tokens": None}, "max_new_tokens is not given"),
    ],
)
def test_what_is_left_to_generate(asked: dict[str, Any], reason: str) -> None:
    config = tiny_gpt2().generation_config
    got = own_sampling(config, {"do_sample": True, "max_new_tokens": 5, **asked})
    assert isinstance(got, str) and reason in got


def test_the_usual_settings_are_our_own() -> None:
    config = tiny_gpt2().generation_config
    usual = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0, "max_new_tokens": 5}
    assert own_sampling(config, usual) == Sampling(stops=(1,))
    # transformers samples from the 50 most likely words if nobody names a number.
    assert own_sampling(config, {"do_sample": True, "max_new_tokens": 5}) == Sampling(stops=(1,), top_k=50)


def test_the_default_top_k_is_that_of_transformers() -> None:
    """Were it to change there, a sampler would silently be compared with another distribution."""
    model = tiny_gpt2(vocab_size=200, initializer_range=0.5)
    scores = model.generate(
        torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long), do_sample=True, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True, pad_token_id=0,
    ).scores[0]  # fmt: skip
    assert int(torch.isfinite(scores).sum()) == 50


def test_the_reason_for_generate_is_logged_once(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    trainer = make_trainer()
    with caplog.at_level(logging.INFO, logger="trl"):
        for _ in range(2):
            trainer.generate(QUERIES, max_new_tokens=3, do_sample=False, num_beams=2)
            trainer.generate(QUERIES, max_new_tokens=3, do_sample=False)
    reasons = [r.message for r in caplog.records if "transformers' generate" in r.message]
    assert reasons == ["sampling with transformers' generate: num_beams=2"]


def test_a_global_seed_gives_the_same_responses_again(make_trainer: Any) -> None:  # noqa: F811
    from trl import set_seed

    trainer = make_trainer()
    runs = []
    for size in (2, 5):
        set_seed(5)
        first = trainer.generate(QUERIES, batch_size=size, max_new_tokens=8, do_sample=True, top_k=0)
        second = trainer.generate(QUERIES, batch_size=size, max_new_tokens=8, do_sample=True, top_k=0)
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
        runs.append(first + second)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_cache_grows_and_keeps_what_it_holds() -> None:
    layer, kept = GrowingLayer(), []
    generator = torch.Generator().manual_seed(0)
    for n in (3, 1, 70, 1, 200, 1):
        keys, values = (torch.randn(4, 2, n, 8, generator=generator) for _ in range(2))
        kept.append((keys, values))
        seen = layer.update(keys, values)
        for got, parts in zip(seen, zip(*kept, strict=True), strict=True):
            assert torch.equal(got, torch.cat(parts, dim=2))
    layer.batch_select_indices(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.keys, torch.cat([k for k, _ in kept], dim=2)[[2, 0, 0]])
    assert layer.get_seq_length() == 276


@pytest.mark.kernel
def test_layers_with_a_window_stay_what_they_are() -> None:
    (mistral,) = (a for a in ZOO if a.name == "Mistral")
    assert not any(isinstance(layer, GrowingLayer) for layer in growing_cache(mistral.build().config).layers)
    assert all(isinstance(layer, GrowingLayer) for layer in growing_cache(tiny_gpt2().config).layers)


def test_a_query_that_stands_there_twice_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = engine._CausalDecoder._forward

    def counted(self: Any, tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        return forward(self, tokens)

    monkeypatch.setattr(engine._CausalDecoder, "_forward", counted)
    sample(tiny_gpt2(), QUERIES, sampling=Sampling(), limits=[3] * 5, uniforms=numbers(3, 5))
    assert rows == [4, 5, 5]


def test_the_projection_is_given_rows_that_lie_together() -> None:
    """torch multiplies each row of a slice with a copy of the weights: 16 queries would take 16 times the projection."""
    model = tiny_llama()
    together: list[bool] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: together.append(args[0].is_contiguous()))
    queries = [torch.tensor([3, 4, 5 + i]) for i in range(4)]
    sample(model, queries, sampling=Sampling(), limits=[2] * 4, uniforms=numbers(2, 4))
    assert together == [True, True]


def test_a_model_in_bfloat16_is_driven() -> None:
    """Its rounding is no obstacle; a decoding that goes wrong is, as in float32."""
    assert obstacle(tiny_llama().bfloat16()) is None
