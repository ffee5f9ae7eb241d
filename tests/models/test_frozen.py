"""Frozen first layers: passes that begin above them say what whole passes say, and learn what they learn."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora, stir
from tests.models.rollouts import make_rollout
from trl.kernels.door import kernels_enabled
from trl.models import AutoModelForCausalLMWithValueHead as Causal
from trl.models import (
    RolloutAboveFrozen,
    create_reference_model,
    evaluate,
    evaluate_exact_kl,
    frozen,
    frozen_depth,
    frozen_states,
    reference_mode,
    shares_frozen,
)


def counted(model: nn.Module) -> list[int]:
    """A list that every pass through the inside of the first layer adds something to."""
    seen: list[int] = []
    first = next(frozen._layers(frozen.base_language_model(model))[0].children())
    first.register_forward_hook(lambda module, args, output: seen.append(1))
    return seen


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("side", ["left", "right"])
def test_same_numbers_and_gradients(make: Any, side: str, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("trl.models.evaluate"), "may_pack", lambda model: packs)
    model = Causal.from_pretrained(make()).double().eval()
    reference = create_reference_model(model, num_shared_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    assert frozen_depth(model) == 1
    assert shares_frozen(model, reference, 1)
    rollout = make_rollout(side)
    states = frozen_states(model, rollout, 1)
    assert states.shape == (*rollout.tokens.shape, 16) and not states[~rollout.attention].any()
    passes = counted(model)
    short = RolloutAboveFrozen.of(rollout, states, 1)
    found = []
    for some in (rollout, short):
        model.zero_grad()
        passes.clear()
        said = evaluate(model, some, entropy=True, response_only=True)
        assert bool(passes) == (some is rollout or not kernels_enabled())
        (said.logprobs.sum() + (said.values**2).sum() + said.entropy.sum()).mul(0.1).backward()
        found.append((said, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (begun, others) = found
    for name in ("logprobs", "values", "entropy"):
        assert_close(getattr(begun, name), getattr(whole, name), tol=1e-12)
    assert gradients.keys() == others.keys() and len(gradients) > 5
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, tol=1e-12)
    with torch.no_grad():
        assert_close(evaluate(reference, short).logprobs, evaluate(reference, rollout).logprobs, tol=1e-12)
        kls = [evaluate_exact_kl(model, lambda: nullcontext(reference), some) for some in (short, rollout)]
        assert_close(*kls, tol=1e-12)


@pytest.mark.kernel
def test_wrong_states_are_seen() -> None:
    model = Causal.from_pretrained(tiny_llama()).eval()
    create_reference_model(model, num_shared_layers=1)
    rollout = make_rollout("right")
    states = frozen_states(model, rollout, 1)
    with torch.no_grad():
        right = evaluate(model, RolloutAboveFrozen.of(rollout, states, 1)).logprobs
        wrong = evaluate(model, RolloutAboveFrozen.of(rollout, states * 1.1, 1)).logprobs
    assert (right - wrong).abs().max() > 1e-4


def test_depth() -> None:
    def depth(model: Any, shared: int | None) -> int:
        wrapped = Causal.from_pretrained(model).eval()
        if shared is not None:
            create_reference_model(wrapped, num_shared_layers=shared)
        return frozen_depth(wrapped)

    assert depth(tiny_llama(), None) == 0
    assert depth(tiny_llama(), 0) == 0
    assert depth(tiny_llama(num_hidden_layers=4), 3) == 3
    assert depth(tiny_gpt2(), 2) == 2  # the value head is trained, and the last norm
    model = tiny_llama()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    assert frozen_depth(model) == 0  # its embeddings learn
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(False)
    assert frozen_depth(model) == 0
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    assert frozen_depth(model) == 1
    assert frozen_depth(tiny_t5()) == 0


def test_under_an_adapter_on_upper_layers() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2(n_layer=3), layers_to_transform=[2])).eval()
    stir(model)
    assert frozen_depth(model) == 2
    rollout = make_rollout("left")
    short = RolloutAboveFrozen.of(rollout, frozen_states(model, rollout, 2), 2)
    with torch.no_grad():
        assert_close(evaluate(model, short).logprobs, evaluate(model, rollout).logprobs, tol=1e-5)
        with reference_mode(model):
            assert shares_frozen(model, model, 2)
            assert_close(evaluate(model, short).logprobs, evaluate(model, rollout).logprobs, tol=1e-5)
    assert frozen_depth(Causal.from_pretrained(lora(tiny_gpt2())).eval()) == 0


def test_frozen_adapters_that_say_something_are_not_the_references() -> None:
    model = Causal.from_pretrained(lora(tiny_gpt2(n_layer=3))).eval()
    stir(model)
    for name, parameter in model.named_parameters():
        if ".h.2." not in name:
            parameter.requires_grad_(False)
    assert frozen_depth(model) == 2
    with reference_mode(model):
        assert not shares_frozen(model, model, 2)


def test_each_depth_is_tried_and_whatever_a_layer_raises() -> None:
    model = tiny_gpt2(n_layer=3)
    create_reference_model(model, num_shared_layers=1)
    left: dict[str, bool] = {}  # what the second layer leaves for the third, which fails without it
    second, third = model.transformer.h[1:]
    plain = third.forward
    second.attn.register_forward_hook(lambda module, args, output: left.update(here=True))
    third.forward = lambda hidden, *args, **kwargs: plain(hidden * left.pop("here"), *args, **kwargs)
    assert frozen_depth(model) == 1
    create_reference_model(model, num_shared_layers=2)
    assert frozen_depth(model) == 0  # the third layer wants something of the second


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft passes its prefix so
def test_a_prefix_that_is_trained_comes_before_all_layers() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():  # peft asks transformers under an older name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = peft.get_peft_model(tiny_gpt2(), config).eval()
    assert not any(p.requires_grad for p in frozen.base_language_model(model).parameters())
    assert frozen_depth(model) == 0


def test_a_copy_shares_nothing() -> None:
    model = Causal.from_pretrained(tiny_gpt2()).eval()
    copy = create_reference_model(model)
    create_reference_model(model, num_shared_layers=1)
    assert frozen_depth(model) == 1
    assert not shares_frozen(model, copy, 1)
    reference = create_reference_model(model, num_shared_layers=1)
    assert shares_frozen(model, reference, 1)
    reference.pretrained_model.transformer.wpe = nn.Embedding(64, 16)
    assert not shares_frozen(model, reference, 1)


@pytest.mark.kernel
def test_layers_that_drop_at_random_are_run() -> None:
    model = Causal.from_pretrained(tiny_gpt2(resid_pdrop=0.5)).eval()
    create_reference_model(model, num_shared_layers=1)
    rollout = make_rollout("right")
    short = RolloutAboveFrozen.of(rollout, frozen_states(model, rollout, 1) + torch.nan, 1)
    model.train()
    assert evaluate(model, short).logprobs[rollout.mask].isfinite().all()
    model.eval()
    assert evaluate(model, short).logprobs[rollout.mask].isnan().any()


def test_a_model_whose_passes_cannot_begin_above(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt2()
    create_reference_model(model, num_shared_layers=1)
    second = model.transformer.h[1]
    plain, kept = second.forward, []
    model.transformer.h[0].register_forward_hook(lambda module, args, output: kept.append(args[0]))
    # A layer that looks at more than what the one before it returns: here at its input.
    second.forward = lambda hidden, *args, **kwargs: plain(hidden + kept[-1].sum() * (len(kept) % 2), *args, **kwargs)
    with caplog.at_level("INFO", logger="trl"):
        assert frozen_depth(model) == 0
        assert frozen_depth(model) == 0
    assert caplog.text.count("every pass runs the frozen first layers") == 1
