"""`generate_responses` and what `generate` is asked for: where responses end, and what is refused before sampling."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tests.helpers import tiny_gpt2, tiny_llama
from tests.trainer.conftest import make_trainer  # noqa: F401  (fixture)
from trl.core import LengthSampler
from trl.data import pad
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models.limits import context_length
from trl.rollout import Sampling, generate_responses, own_sampling, unseen_by_scoring

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10])]
PAD, EOS = 0, 1


class Scripted(nn.Module):
    """A model whose `generate` writes given rows, pads behind a stop token, and asks its criteria after each token."""

    def __init__(self, *rows: list[int], stop: int | None = EOS) -> None:
        super().__init__()
        self.rows, self.stop = rows, stop
        self.weight = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=stop)

    def generate(self, input_ids: Tensor, stopping_criteria: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        running = torch.ones(len(input_ids), dtype=torch.bool)
        for chosen in torch.tensor(self.rows).t():
            written = torch.where(running, chosen, PAD) if self.stop is not None else chosen
            input_ids = torch.cat([input_ids, written[:, None]], dim=1)
            ends = stopping_criteria(input_ids, None)
            running = running & ~ends & (chosen != (-1 if self.stop is None else self.stop))
            if not running.any():
                break
        return SimpleNamespace(sequences=input_ids)


def responses_of(model: Any, queries: list[Tensor] = QUERIES, **kwargs: Any) -> list[list[int]]:
    found = generate_responses(
        model,
        queries,
        collate=lambda examples, side: dict(
            zip(("input_ids", "attention_mask"), pad([e["input_ids"] for e in examples], PAD, side), strict=True)
        ),
        is_encoder_decoder=False,
        batch_size=kwargs.pop("batch_size", 4),
        return_prompt=kwargs.pop("return_prompt", False),
        limits=None,
        tokenizer=None,
        generation_kwargs=kwargs,
    )
    return [response.tolist() for response in found]


def test_a_stop_token_ends_a_response_and_stays() -> None:
    model = Scripted([4, EOS, 4, 4], [4, 4, 4, EOS], [EOS, 4, 4, 4])
    assert responses_of(model) == [[4, EOS], [4, 4, 4, EOS], [EOS]]
    assert responses_of(model, return_prompt=True) == [[5, 6, 7, 4, EOS], [8, 4, 4, 4, EOS], [9, 10, EOS]]


def test_without_a_stop_token_nothing_is_cut() -> None:
    """Neither at the pad token, nor at what was an eos elsewhere."""
    rows = ([4, PAD, 4, EOS], [PAD, 4, PAD, PAD], [EOS, EOS, 4, 4])
    assert responses_of(Scripted(*rows, stop=None), eos_token_id=None) == [list(row) for row in rows]


def test_a_sampled_pad_token_is_an_action() -> None:
    assert responses_of(Scripted([PAD, 4, EOS, 4], [4, PAD, PAD, PAD], [4, 4, 4, EOS])) == [
        [PAD, 4, EOS], [4, PAD, PAD, PAD], [4, 4, 4, EOS],
    ]  # fmt: skip


class After(StoppingCriteria):
    """Ends each row after the first of its `numbers` of calls: it counts, so that it must be asked once a token."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.calls = torch.tensor(numbers), 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self.numbers == self.calls


@pytest.mark.parametrize("stop", [EOS, None])
def test_a_criterion_ends_a_response(stop: int | None) -> None:
    """Where there is no stop token, `generate` goes on with a row that has ended: what it writes there was not asked for."""
    model = Scripted([4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7], stop=stop)
    criteria = StoppingCriteriaList([After(1, 4, 9), After(9, 3, 2)])
    assert responses_of(model, stopping_criteria=criteria) == [[4], [4, 5, 6], [4, 5]]


def test_ends_that_are_unknown_are_an_error() -> None:
    class Deaf(Scripted):
        def generate(self, **kwargs: Any) -> Any:
            return super().generate(**kwargs | {"stopping_criteria": lambda ids, scores: torch.tensor(False)})

    with pytest.raises(RuntimeError, match="generate of Deaf asks no stopping criteria"):
        responses_of(Deaf([4, EOS], [4, 4], [4, 4]))
    assert responses_of(Deaf([4, EOS]), QUERIES[:1]) == [[4, EOS]]


# What is asked for -----------------------------------------------------------------------------------------------------


def test_arguments_go_before_a_generation_config_before_the_model_s_own() -> None:
    own = GenerationConfig(do_sample=True, top_k=7, top_p=0.5, eos_token_id=3)
    given = {"generation_config": GenerationConfig(do_sample=True, top_k=3, eos_token_id=[13, 4])}
    assert unseen_by_scoring(own, given, 1.0) == {"top_k": 3, "top_p": 0.5}
    assert unseen_by_scoring(own, given | {"top_k": 0}, 1.0) == {"top_p": 0.5}
    assert unseen_by_scoring(own, {}, 1.0) == {"top_k": 7, "top_p": 0.5}


def test_top_k_none_cuts_nothing_as_in_transformers() -> None:
    own = tiny_gpt2(vocab_size=200).generation_config
    asked = {"do_sample": True, "max_new_tokens": 1, "top_k": None}
    assert own_sampling(own, asked) == Sampling(stops=(1,))
    assert unseen_by_scoring(own, asked, 1.0) == {}
    scores = tiny_gpt2(vocab_size=200).generate(
        torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2).long(), output_scores=True, pad_token_id=0,
        return_dict_in_generate=True, **asked,
    ).scores[0]  # fmt: skip
    assert int(torch.isfinite(scores).sum()) == 200


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 3},
        {"top_k": 0, "prefix_allowed_tokens_fn": lambda row, ids: [4, 5]},
        {"generation_config": GenerationConfig(do_sample=True, top_k=3)},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_reshaped_sampling_is_named(make_trainer: Any, asked: dict[str, Any]) -> None:  # noqa: F811
    with pytest.warns(UserWarning, match="top_k=3|prefix_allowed_tokens_fn="):
        make_trainer().generate(QUERIES, do_sample=True, max_new_tokens=2, **asked)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number > 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"temperature": math.nan}, "temperature=nan must be"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 cannot be asked for: generate returns one response"),
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences=2"),
        ({"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2)}, "num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True cannot be asked for"),
        ({"custom_generate": "some/repository"}, "custom_generate='some/repository' cannot"),
        ({"token_healing": True}, "token_healing=True"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids cannot be asked for: generate makes it of the queries"),
        ({"decoder_input_ids": torch.ones(1, 1)}, "decoder_input_ids cannot be asked for"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' cannot"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_one_response_per_query_is_refused(
    make_trainer: Any,  # noqa: F811
    asked: dict[str, Any],
    named: str,
    own: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer()
    if not own:
        asked = {"repetition_penalty": 1.1} | asked
    monkeypatch.setattr(trainer.model.pretrained_model, "forward", None)  # nothing may be computed
    with pytest.raises(ValueError, match=named):
        trainer.generate(QUERIES, **({"do_sample": True, "max_new_tokens": 4, "top_k": 0} | asked))


def test_a_temperature_that_plays_no_part_is_not_looked_at(make_trainer: Any) -> None:  # noqa: F811
    got = make_trainer().generate(QUERIES, do_sample=False, temperature=0.0, max_new_tokens=2, return_prompt=False)
    assert [len(response) for response in got] == [2, 2, 2]


def test_speculative_decoding_returns_whole_responses(make_trainer: Any) -> None:  # noqa: F811
    trainer = make_trainer()
    greedy = {"do_sample": False, "max_new_tokens": 12, "return_prompt": False}
    plain = trainer.generate(QUERIES, **greedy)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_gpt2(1)}):
        got = trainer.generate(QUERIES, batch_size=1, **greedy, **more)
        assert [r.tolist() for r in got] == [r.tolist() for r in plain]


# Room ------------------------------------------------------------------------------------------------------------------


def _long(n: int) -> list[Tensor]:
    return [torch.tensor([5]), torch.full((n,), 7)]


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize(
    "asked",
    [{}, {"num_beams": 2}, {"generation_config": GenerationConfig(max_new_tokens=5)}, {"length_sampler": lambda: 5}],
    ids=lambda asked: "-".join(asked) or "own",
)
def test_a_response_that_may_not_fit_is_refused_before_sampling(
    make_trainer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    llama: bool,
) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama()) if llama else None
    trainer = make_trainer(model=model)
    asked = {"max_new_tokens": 5} | asked if "generation_config" not in asked else asked
    assert [len(r) for r in trainer.generate(_long(59), do_sample=False, eos_token_id=None, **asked)] == [6, 64]
    monkeypatch.setattr(trainer.model.pretrained_model, "forward", None)
    with pytest.raises(
        ValueError, match=r"query_tensor\[1\]: .*max_new_tokens=5 .* after 60 of the query .* 64 tokens: .* 4 new"
    ):
        trainer.generate(_long(60), do_sample=False, **asked)


def test_max_length_counts_the_query(make_trainer: Any) -> None:  # noqa: F811
    trainer = make_trainer()
    assert [len(r) for r in trainer.generate(_long(60), max_length=64, do_sample=False, eos_token_id=None)] == [5, 64]
    with pytest.raises(ValueError, match=r"max_new_tokens=5 .*60 of the query"):
        trainer.generate(_long(60), max_length=65, do_sample=False)


def test_an_encoder_decoder_has_room_for_queries_and_for_responses(make_trainer: Any) -> None:  # noqa: F811
    from transformers import LEDConfig, LEDForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 4, "vocab_size": 61}
    config = LEDConfig(
        **sizes, max_encoder_position_embeddings=32, max_decoder_position_embeddings=16, pad_token_id=0, eos_token_id=1,
        bos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(LEDForConditionalGeneration(config).eval())
    assert (context_length(model, encoder=True), context_length(model)) == (32, 16)
    trainer = make_trainer(seq2seq=True, model=model)
    greedy = {"do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    assert [len(r) for r in trainer.generate(_long(20), max_new_tokens=15, **greedy)] == [16, 16]
    with pytest.raises(
        ValueError, match=r"max_new_tokens=16 tokens after the decoder's start token .* 16 tokens: .* 15 new"
    ):
        trainer.generate(_long(20), max_new_tokens=16, **greedy)
    with pytest.raises(ValueError, match="the query of sample 1 is 33 tokens long"):
        trainer.generate(_long(33), max_new_tokens=4, **greedy)


def test_lengths_are_drawn_before_anything_is_sampled(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    trainer = make_trainer()
    with pytest.raises(ValueError, match="length_sampler drew 0"):
        trainer.generate(QUERIES, lambda: 0)
    drawn = iter([2, 80])
    monkeypatch.setattr(trainer.model.pretrained_model, "forward", None)
    with pytest.raises(ValueError, match=r"query_tensor\[2\]: .*max_new_tokens=80"):
        trainer.generate(QUERIES, lambda: next(drawn), batch_size=2, do_sample=False)
    assert max(LengthSampler(2, 9).values) == 8


@pytest.mark.parametrize("asked", [{"do_sample": True, "top_k": 0}, {"do_sample": False}], ids=["drawn", "likeliest"])
@pytest.mark.parametrize("vocabulary", [61, 700])
def test_logits_that_are_not_finite_are_an_error(asked: dict[str, Any], vocabulary: int, make_trainer: Any) -> None:  # noqa: F811
    trainer = make_trainer(model=AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(vocab_size=vocabulary)))
    asked = asked | {"max_new_tokens": 3, "eos_token_id": -1}
    trainer.generate(QUERIES, **asked)
    trainer.model.pretrained_model.transformer.wpe.weight.data[3] = math.nan  # of the first response token behind three
    with pytest.raises(RuntimeError, match=r"logits after 3 tokens of a query and 1 of its response hold NaN"):
        trainer.generate(QUERIES[:1], **asked)
    assert len(trainer.generate(QUERIES[1], **asked | {"max_new_tokens": 2})[0]) == 3


def test_a_mask_of_ones_for_one_query_says_nothing_new(make_trainer: Any) -> None:  # noqa: F811
    trainer = make_trainer()
    asked = {"do_sample": False, "max_new_tokens": 3}
    expected = trainer.generate(QUERIES[0], **asked)
    for mask in (torch.ones(3), torch.ones(1, 3, dtype=torch.int64)):
        assert torch.equal(trainer.generate(QUERIES[0], attention_mask=mask, **asked), expected)
    for mask in (torch.tensor([[0, 1, 1]]), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="attention_mask cannot be asked for"):
            trainer.generate(QUERIES[0], attention_mask=mask, **asked)
