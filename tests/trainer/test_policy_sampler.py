"""`PPOTrainer.generate`: which engine a call goes to, and what is refused before anything is sampled."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from tests.helpers import tiny_gpt2, tiny_llama
from trl.core import LengthSampler
from trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models.limits import context_length
from trl.rollout import LocalEngine, TransformersEngine

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10])]
FIVE = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [8, 9, 10, 11, 12], [40])]


@pytest.mark.parametrize(
    "asked",
    [
        {"top_k": 3},
        {"top_k": 0, "prefix_allowed_tokens_fn": lambda row, ids: [4, 5]},
        {"generation_config": GenerationConfig(do_sample=True, top_k=3)},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_reshaped_sampling_is_named(make_trainer: Any, asked: dict[str, Any]) -> None:
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
        ({"num_return_sequences": 2}, "num_return_sequences=2 is not supported: generate returns one response"),
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences=2"),
        ({"generation_config": GenerationConfig(do_sample=True, num_return_sequences=2)}, "num_return_sequences=2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True is not supported"),
        ({"custom_generate": "some/repository"}, "custom_generate='some/repository' is not supported"),
        ({"token_healing": True}, "token_healing=True"),
        ({"input_ids": torch.ones(1, 1)}, "input_ids is not supported: generate builds it from the queries"),
        ({"decoder_input_ids": torch.ones(1, 1)}, "decoder_input_ids is not supported"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_one_response_per_query_is_refused(
    make_trainer: Any,
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


def test_a_temperature_that_plays_no_part_is_not_looked_at(make_trainer: Any) -> None:
    got = make_trainer().generate(QUERIES, do_sample=False, temperature=0.0, max_new_tokens=2, return_prompt=False)
    assert [len(response) for response in got] == [2, 2, 2]


def test_speculative_decoding_returns_whole_responses(make_trainer: Any) -> None:
    trainer = make_trainer()
    greedy = {"do_sample": False, "max_new_tokens": 12, "return_prompt": False}
    plain = trainer.generate(QUERIES, **greedy)
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_gpt2(1)}):
        got = trainer.generate(QUERIES, batch_size=1, **greedy, **more)
        assert [r.tolist() for r in got] == [r.tolist() for r in plain]


def _long(n: int) -> list[Tensor]:
    return [torch.tensor([5]), torch.full((n,), 7)]


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize(
    "asked",
    [{}, {"num_beams": 2}, {"generation_config": GenerationConfig(max_new_tokens=5)}, {"length_sampler": lambda: 5}],
    ids=lambda asked: "-".join(asked) or "own",
)
def test_a_response_that_may_not_fit_is_refused_before_sampling(
    make_trainer: Any,
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
        ValueError, match=r"query_tensor\[1\]: .*max_new_tokens=5 .* after a query of 60 tokens .* 64 tokens; .* 4 new"
    ):
        trainer.generate(_long(60), do_sample=False, **asked)


def test_max_length_counts_the_query(make_trainer: Any) -> None:
    trainer = make_trainer()
    assert [len(r) for r in trainer.generate(_long(60), max_length=64, do_sample=False, eos_token_id=None)] == [5, 64]
    with pytest.raises(ValueError, match=r"max_new_tokens=5 .*a query of 60 tokens"):
        trainer.generate(_long(60), max_length=65, do_sample=False)


def test_an_encoder_decoder_has_room_for_queries_and_for_responses(make_trainer: Any) -> None:
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
        ValueError, match=r"max_new_tokens=16 tokens after the decoder's start token .* 16 tokens; .* 15 new"
    ):
        trainer.generate(_long(20), max_new_tokens=16, **greedy)
    with pytest.raises(ValueError, match="the query of sample 1 is 33 tokens long"):
        trainer.generate(_long(33), max_new_tokens=4, **greedy)


def test_lengths_are_drawn_before_anything_is_sampled(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_logits_that_are_not_finite_are_an_error(asked: dict[str, Any], vocabulary: int, make_trainer: Any) -> None:
    trainer = make_trainer(model=AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(vocab_size=vocabulary)))
    asked = asked | {"max_new_tokens": 3, "eos_token_id": -1}
    trainer.generate(QUERIES, **asked)
    trainer.model.pretrained_model.transformer.wpe.weight.data[3] = math.nan  # of the first response token behind three
    with pytest.raises(RuntimeError, match=r"logits are NaN or infinite after 3 query tokens and 1 response tokens"):
        trainer.generate(QUERIES[:1], **asked)
    assert len(trainer.generate(QUERIES[1], **asked | {"max_new_tokens": 2})[0]) == 3


def test_a_mask_of_ones_for_one_query_says_nothing_new(make_trainer: Any) -> None:
    trainer = make_trainer()
    asked = {"do_sample": False, "max_new_tokens": 3}
    expected = trainer.generate(QUERIES[0], **asked)
    for mask in (torch.ones(3), torch.ones(1, 3, dtype=torch.int64)):
        assert torch.equal(trainer.generate(QUERIES[0], attention_mask=mask, **asked), expected)
    for mask in (torch.tensor([[0, 1, 1]]), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="attention_mask is not supported"):
            trainer.generate(QUERIES[0], attention_mask=mask, **asked)


def test_lengths_are_drawn_once_per_batch(make_trainer: Any) -> None:
    for own in ({}, {"num_beams": 2}):  # our own loop; generate
        got = make_trainer().generate(
            FIVE,
            iter([3, 6, 1]).__next__,
            batch_size=2,
            return_prompt=False,
            do_sample=False,
            eos_token_id=None,
            **own,
        )
        assert [len(r) for r in got] == [3, 3, 6, 6, 1]


def test_the_reason_for_generate_is_logged_once(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    with caplog.at_level(logging.INFO, logger="trl"):
        for _ in range(2):
            trainer.generate(FIVE, max_new_tokens=3, do_sample=False, num_beams=2)
            trainer.generate(FIVE, max_new_tokens=3, do_sample=False)
    reasons = [r.message for r in caplog.records if "transformers' generate" in r.message]
    assert reasons == ["sampling with transformers' generate: num_beams=2"]


def test_a_global_seed_gives_the_same_responses_again(make_trainer: Any) -> None:
    from trl import set_seed

    trainer = make_trainer()
    runs = []
    for size in (2, 5):
        set_seed(5)
        first = trainer.generate(FIVE, batch_size=size, max_new_tokens=8, do_sample=True, top_k=0)
        second = trainer.generate(FIVE, batch_size=size, max_new_tokens=8, do_sample=True, top_k=0)
        assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
        runs.append(first + second)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rollouts_name_the_version_of_the_policy(
    make_trainer: Any, make_batch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    versions: list[int] = []
    trainer, asked = make_trainer(), {"do_sample": False, "max_new_tokens": 2}
    trainer.generate(QUERIES, **asked)  # the model's trial samples, too
    for kind in (LocalEngine, TransformersEngine):
        generate = kind.generate

        def noted(self: Any, queries: Any, sampling: Any, generate: Any = generate) -> Any:
            rollout = generate(self, queries, sampling)
            versions.append(rollout.policy_version)
            return rollout

        monkeypatch.setattr(kind, "generate", noted)
    trainer.generate(QUERIES, **asked)
    trainer.generate(QUERIES, num_beams=2, **asked)
    trainer.step(*make_batch())
    trainer.generate(QUERIES, **asked)
    trainer.save_checkpoint(tmp_path)
    trainer.load_checkpoint(tmp_path)
    trainer.generate(QUERIES, num_beams=2, **asked)
    assert versions == [0, 0, 1, 2]


def test_a_model_is_tried_once(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr("trl.rollout.choice.obstacle", lambda model: tried.append(model))
    trainer = make_trainer()
    for _ in range(2):
        trainer.generate(QUERIES, do_sample=False, max_new_tokens=2)
    assert tried == [trainer.model.pretrained_model]
    trainer.model.pretrained_model = tiny_gpt2(1)
    trainer.generate(QUERIES, do_sample=False, max_new_tokens=2)
    assert tried[1:] == [trainer.model.pretrained_model]


def test_a_warning_points_at_the_call(make_trainer: Any) -> None:
    with pytest.warns(UserWarning, match="top_k=3") as caught:
        make_trainer().generate(QUERIES, do_sample=True, top_k=3, max_new_tokens=2)
    assert [warning.filename for warning in caught if "top_k=3" in str(warning.message)] == [__file__]
