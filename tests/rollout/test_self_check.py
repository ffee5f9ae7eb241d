"""Which models our own loop drives: each is tried, and what goes wrong is found."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_llama, with_cache_called
from tests.models.zoo import DRIVEN, ZOO, Architecture, sharp
from trl.rollout import known_obstacle, obstacle
from trl.rollout.self_check import fixed_steps_obstacle

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9, 10, 11, 12])]


@pytest.mark.parametrize("architecture", DRIVEN, ids=lambda a: a.name)
def test_nothing_stands_against_it(architecture: Architecture) -> None:
    assert obstacle(sharp(architecture)) is None


@pytest.mark.parametrize("architecture", [a for a in ZOO if "Mamba" in a.name], ids=lambda a: a.name)
def test_a_state_space_model_is_left_to_generate(architecture: Architecture) -> None:
    assert "does not keep its state in a key-value cache" in (obstacle(architecture.build()) or "")


def test_a_model_that_is_not_causal_is_found_out() -> None:
    """In ProphetNet's forward pass what a token is predicted from includes tokens after it: docs/models.md, Limits."""
    (architecture,) = (a for a in ZOO if a.name == "ProphetNet")
    model = sharp(architecture)
    assert "differ from a forward pass" in (obstacle(model) or "")
    written = torch.tensor([[2, 9, 10, 11, 12]])
    with torch.no_grad():
        whole, beginning = (
            model(input_ids=QUERIES[1][None], decoder_input_ids=written[:, :n]).logits[0, :3] for n in (5, 3)
        )
    assert (whole - beginning).abs().max() > 0.01


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
    assert "differ from a forward pass" in (obstacle(model) or "")


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_forward_has_for_it(keyword: str) -> None:
    model, seen = with_cache_called(keyword, tiny_gpt2())
    assert obstacle(model) is None
    assert (
        sum(cache is not None for cache in seen) == 8
    )  # the trial: queries and four tokens; a row's size: one; the engine: two


def test_a_model_that_cannot_be_decoded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no cache here")

    monkeypatch.setattr(model, "forward", fails)
    assert "RuntimeError: no cache here" in (obstacle(model) or "")


def test_a_model_that_the_engine_cannot_sample_from_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs the engine itself, not only the forward passes below it."""

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("no such name in this config")

    monkeypatch.setattr("trl.rollout.local.LocalEngine._rows_at_once", fails)
    assert "AttributeError: no such name in this config" in (obstacle(tiny_gpt2()) or "")


@pytest.mark.parametrize("check", [known_obstacle, pytest.param(fixed_steps_obstacle, marks=pytest.mark.kernel)])
def test_running_out_of_memory_says_nothing_about_the_model(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt2()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            check(model)
    assert check(model) is None  # tried again


def test_an_error_is_a_warning_in_the_log_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gpt2()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no cache here")

    monkeypatch.setattr(model, "forward", fails)
    for _ in range(2):
        known_obstacle(model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "RuntimeError: no cache here" in record.getMessage()


def test_an_ordinary_reason_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    stateful, not_causal = (next(a for a in ZOO if a.name == name) for name in ("Mamba", "ProphetNet"))
    assert known_obstacle(stateful.build()) and known_obstacle(sharp(not_causal))
    assert not [
        record for record in caplog.records if record.name.startswith("trl") and record.levelno >= logging.WARNING
    ]


def test_a_model_in_bfloat16_is_driven() -> None:
    """Its rounding is no obstacle; a decoding that goes wrong is, as in float32."""
    assert obstacle(tiny_llama().bfloat16()) is None
