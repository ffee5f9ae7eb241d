"""What the arguments of a `generate` call ask for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers import tiny_gpt2
from trl.rollout import check_sampling, local_sampling, unseen_by_scoring
from trl.types import Sampling


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"min_length": 5}, "min_length=5 counts the padding"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"num_return_sequences": 3}, "num_return_sequences=3"),
        ({"streamer": object()}, "only generate supports streamer"),
        ({"max_new_tokens": None}, "max_new_tokens is not set"),
    ],
)
def test_what_is_left_to_generate(asked: dict[str, Any], reason: str) -> None:
    config = tiny_gpt2().generation_config
    got = local_sampling(config, {"do_sample": True, "max_new_tokens": 5, **asked})
    assert isinstance(got, str) and reason in got


def test_the_usual_settings_are_our_own() -> None:
    config = tiny_gpt2().generation_config
    usual = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0, "max_new_tokens": 5}
    assert local_sampling(config, usual) == Sampling(stops=(1,))
    # transformers samples from the 50 most likely words if nobody names a number.
    assert local_sampling(config, {"do_sample": True, "max_new_tokens": 5}) == Sampling(stops=(1,), top_k=50)


def test_the_default_top_k_is_that_of_transformers() -> None:
    """Were it to change there, a sampler would silently be compared with another distribution."""
    model = tiny_gpt2(vocab_size=200, initializer_range=0.5)
    scores = model.generate(
        torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2, dtype=torch.long), do_sample=True, max_new_tokens=1,
        output_scores=True, return_dict_in_generate=True, pad_token_id=0,
    ).scores[0]  # fmt: skip
    assert int(torch.isfinite(scores).sum()) == 50


def test_arguments_go_before_a_generation_config_before_the_model_s_own() -> None:
    own = GenerationConfig(do_sample=True, top_k=7, top_p=0.5, eos_token_id=3)
    given = {"generation_config": GenerationConfig(do_sample=True, top_k=3, eos_token_id=[13, 4])}
    assert unseen_by_scoring(own, given, 1.0) == {"top_k": 3, "top_p": 0.5}
    assert unseen_by_scoring(own, given | {"top_k": 0}, 1.0) == {"top_p": 0.5}
    assert unseen_by_scoring(own, {}, 1.0) == {"top_k": 7, "top_p": 0.5}


def test_top_k_none_cuts_nothing_as_in_transformers() -> None:
    own = tiny_gpt2(vocab_size=200).generation_config
    asked = {"do_sample": True, "max_new_tokens": 1, "top_k": None}
    assert local_sampling(own, asked) == Sampling(stops=(1,))
    assert unseen_by_scoring(own, asked, 1.0) == {}
    scores = tiny_gpt2(vocab_size=200).generate(
        torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 2).long(), output_scores=True, pad_token_id=0,
        return_dict_in_generate=True, **asked,
    ).scores[0]  # fmt: skip
    assert int(torch.isfinite(scores).sum()) == 200


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_new_token", "max_new_tokens"), ("temprature", "temperature"), ("topk", "top_k"), ("labels", None)],
)
def test_a_misspelt_argument_names_the_one_that_was_meant(name: str, meant: str | None) -> None:
    config = GenerationConfig()
    problem = (
        nullcontext() if meant is None else pytest.raises(ValueError, match=f"no argument {name}: did you mean {meant}")
    )
    with problem:
        check_sampling(config, {name: 3})
