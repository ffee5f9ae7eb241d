"""bfloat16 passes on float32 weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.trainer.conftest import make_batch, make_trainer  # noqa: F401  (fixtures)
from trl import AutoModelForCausalLMWithValueHead
from trl.kernels.door import kernels_enabled
from trl.models import evaluate
from trl.models.precision import NarrowCopies, choose_dtype
from trl.training.compute import Compute
from trl.types import Rollout

BUILDERS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


def policy(build: Callable[..., Any] = tiny_gpt2, **overrides: Any) -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(build(**overrides), summary_dropout_prob=0.0)


def rollout(rows: int = 3, width: int = 12, seed: int = 0) -> Rollout:
    tokens = torch.randint(3, 61, (rows, width), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones(rows, width, dtype=torch.bool)
    return Rollout(tokens=tokens, attention=attention, mask=attention[:, 1:])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the mean log-probability and value."""
    result = evaluate(model, rollout())
    (result.logprobs.mean() + result.values.mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.conformance
@pytest.mark.parametrize("name", BUILDERS)
def test_36_gradients_point_where_those_of_float64_do(name: str) -> None:
    model = policy(BUILDERS[name])
    exact = gradients(copy.deepcopy(model).double())
    copies = NarrowCopies(model)
    copies.refresh()
    with copies.stand_in():
        assert {p.dtype for n, p in model.named_parameters() if "v_head" not in n} == {torch.bfloat16}
        assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
        result = evaluate(model, rollout())
        assert result.logprobs.dtype == result.values.dtype == torch.float32
        (result.logprobs.mean() + result.values.mean()).backward()
    for parameter_name, p in model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        if "c_attn.bias" in parameter_name:
            continue  # a third of it has a gradient of exactly 0
        cosine = torch.nn.functional.cosine_similarity(
            p.grad.double().flatten(), exact[parameter_name].flatten(), dim=0
        )
        assert cosine > 0.995, parameter_name


@pytest.mark.parametrize("foreign", [False, True], ids=["own buffer", "somebody's gradient"])
def test_gradients_of_several_passes_add_up_in_float32(foreign: bool) -> None:
    model = policy()
    copies = NarrowCopies(model)
    copies.refresh()

    def run(seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for seed in seeds:
            with copies.stand_in():
                evaluate(model, rollout(seed=seed)).logprobs.mean().backward()
            if foreign:
                for p in model.parameters():
                    p.grad = None if p.grad is None else p.grad.clone()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    first, second, third = (run((seed,)) for seed in (1, 2, 3))
    together = run((1, 2, 3))
    assert len(together) > 10
    for name, gradient in together.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, first[name] + second[name] + third[name])


def test_weights_come_back_after_an_error() -> None:
    model = policy()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    copies = NarrowCopies(model)
    copies.refresh()
    with pytest.raises(ZeroDivisionError), copies.stand_in():
        1 / 0
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_copies_follow_the_weights_when_told() -> None:
    model = policy()
    copies = NarrowCopies(model)
    copies.refresh()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with copies.stand_in(), pytest.raises(RuntimeError, match="stand in"):
        copies.refresh()
    copies.refresh()
    with copies.stand_in():
        narrow = model.pretrained_model.transformer.wte.weight.detach().clone()
    assert torch.equal(narrow, model.pretrained_model.transformer.wte.weight.detach().bfloat16())


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_step_in_bfloat16(seq2seq: bool, make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainers = {dtype: make_trainer(seq2seq=seq2seq, dtype=dtype) for dtype in ("float32", "bfloat16")}
    stats = {dtype: trainer.step(*make_batch(seq2seq=seq2seq)) for dtype, trainer in trainers.items()}
    narrow = trainers["bfloat16"]
    assert {p.dtype for p in narrow.model.parameters()} == {torch.float32}
    streamed = [p for n, p in narrow.model.named_parameters() if "v_head" not in n and ".wo." not in n]
    assert all((p.grad is None) == kernels_enabled() for p in streamed)
    assert {s.dtype for state in narrow.optimizer.state.values() for s in state.values()} == {torch.float32}
    widths = {name.split(".")[0]: p.dtype for name, p in narrow.ref_model.named_parameters() if ".wo." not in name}
    assert widths == {"pretrained_model": torch.bfloat16, "v_head": torch.float32}
    # Policy and reference are the same narrow model, so nothing is between them before the update.
    assert stats["bfloat16"]["objective/kl"] == 0
    for key in ("ppo/loss/value", "objective/entropy", "ppo/returns/mean"):
        assert_close(stats["bfloat16"][key], stats["float32"][key], 0.02)
    assert any(
        not torch.equal(p, q)
        for p, q in zip(narrow.model.parameters(), make_trainer(seq2seq=seq2seq).model.parameters(), strict=True)
    )


def test_first_ratio_is_one(make_trainer: Any, make_batch: Any) -> None:  # noqa: F811
    trainer = make_trainer(dtype="bfloat16", ppo_epochs=1, mini_batch_size=4)
    stats = trainer.step(*make_batch())
    assert_close(stats["ppo/policy/approxkl"], 0.0, 1e-4)


def test_shared_layers_stay_the_policys(make_batch: Any) -> None:  # noqa: F811
    from tests.helpers import tiny_tokenizer
    from trl import PPOConfig, PPOTrainer

    config = PPOConfig(batch_size=4, mini_batch_size=2, dtype="bfloat16")
    trainer = PPOTrainer(config, policy(), None, tiny_tokenizer(), num_shared_layers=1)
    mine, theirs = (m.pretrained_model.transformer.h[0].mlp.c_fc.weight for m in (trainer.model, trainer.ref_model))
    assert mine is theirs and mine.dtype == torch.float32
    trainer.step(*make_batch())
    assert mine.dtype == torch.float32


def test_automatic_choice() -> None:
    assert choose_dtype(policy(), "auto")[0] == torch.float32  # too small
    assert "too few" in choose_dtype(policy(), "auto")[1]
    assert choose_dtype(policy(), "bfloat16")[0] == torch.bfloat16
    assert choose_dtype(policy().bfloat16(), "auto")[0] == torch.float32


@pytest.mark.parametrize(("flag", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_choice_of_a_large_model(flag: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.models.precision.has_bfloat16", lambda: flag)
    assert choose_dtype(torch.nn.Linear(3200, 3200), "auto")[0] == dtype


def test_two_ways_of_asking_for_bfloat16() -> None:
    accelerator = SimpleNamespace(mixed_precision="bf16", num_processes=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="mixed_precision='bf16' both set"):
        Compute(policy(), "bfloat16", accelerator)
    assert not Compute(policy(), "auto", accelerator).narrow  # accelerate's own way is left alone


def test_across_processes_it_is_autocast() -> None:
    accelerator = SimpleNamespace(mixed_precision="no", num_processes=2, device=torch.device("cpu"))
    model = policy()
    with Compute(model, "bfloat16", accelerator).fresh_passes():
        assert torch.is_autocast_enabled("cpu")
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_unknown_dtype_is_named(make_trainer: Any) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="dtype='float16' must be one of auto, float32, bfloat16"):
        make_trainer(dtype="float16")


def test_t5_keeps_in_float32_what_it_wants_so() -> None:
    from trl import AutoModelForSeq2SeqLMWithValueHead

    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    copies = NarrowCopies(model)
    copies.refresh()
    with copies.stand_in():
        assert {p.dtype for n, p in model.named_parameters() if ".wo." in n} == {torch.float32}
