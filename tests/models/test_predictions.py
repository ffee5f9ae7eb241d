"""Without logits and without padding: the same numbers and gradients as with them, for every kind of model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import PAD, assert_close, tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora, stir
from tests.models.rollouts import make_rollout
from tests.models.test_evaluate import (
    tiny_bart,
    tiny_bloom,
    tiny_falcon_alibi,
    tiny_mamba,
    tiny_opt,
    wrap,
)
from trl.functional import exact_kl
from trl.models import evaluate, evaluate_exact_kl, reference_mode
from trl.models.predictions import Abilities, abilities, may_pack
from trl.types import Rollout

_SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": PAD,
}  # fmt: skip


def tiny_gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_SIZES)).eval()


def tiny_granite() -> Any:
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**_SIZES, logits_scaling=8.0)).eval()


def tiny_sliding() -> Any:
    config = transformers.MistralConfig(**_SIZES, sliding_window=3)
    return transformers.MistralForCausalLM(config).eval()


BOTH, PROJECTS, NEITHER = Abilities(True, True), Abilities(True, False), Abilities(False, False)
EXPECTED = {
    tiny_gpt2: BOTH, tiny_llama: BOTH, tiny_opt: BOTH, tiny_sliding: BOTH, tiny_bloom: PROJECTS,
    tiny_falcon_alibi: PROJECTS, tiny_mamba: PROJECTS, tiny_t5: PROJECTS, tiny_bart: NEITHER, tiny_gemma2: NEITHER,
    tiny_granite: NEITHER,
}  # fmt: skip


@pytest.mark.kernel
@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_what_a_model_can_do_is_found_out(make: Callable[[], Any]) -> None:
    assert abilities(make()) == EXPECTED[make]
    assert abilities(wrap(make())) == EXPECTED[make]


def _numbers(model: Any, rollout: Rollout, response_only: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    got = evaluate(model, rollout, temperature=0.7, entropy=True, response_only=response_only)
    assert got.values is not None and got.entropy is not None
    mask = rollout.mask
    seen = [x[mask] for x in (got.logprobs, got.values, got.entropy)]
    sum((i + 1) * (x * torch.arange(len(x))).sum() for i, x in enumerate(seen)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in seen], grads


@pytest.mark.parametrize("response_only", [False, True])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("make", [m for m in EXPECTED if EXPECTED[m].projects], ids=lambda make: make.__name__)
def test_numbers_and_gradients_are_those_of_padded_logits(
    make: Callable[[], Any], padding: str, response_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(make())
    rollout = make_rollout(padding, seq2seq=model.is_encoder_decoder)
    seen, grads = _numbers(model, rollout, response_only)
    monkeypatch.setattr(import_module("trl.models.evaluate"), "abilities", lambda model: NEITHER)
    expected, expected_grads = _numbers(model, rollout, response_only)
    for got, want in zip(seen, expected, strict=True):
        assert_close(got, want)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, expected_grads[name], tol=2e-5)


@pytest.mark.kernel
def test_adapters_and_a_reference_without_them_are_packed() -> None:
    model = wrap(lora(tiny_gpt2()))
    stir(model)
    assert abilities(model) == BOTH


@pytest.mark.kernel
def test_recomputed_activations_are_not_packed() -> None:
    model = tiny_llama()
    assert may_pack(model.train())
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert not may_pack(model)
    assert may_pack(model.eval())  # nothing is computed again there


def test_the_attention_of_a_model_is_its_own_again() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    evaluate(model, make_rollout("left"))
    assert model.config._attn_implementation == before != "trl_packed"


def test_trying_a_model_leaves_its_modes_alone() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    abilities(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", EXPECTED, ids=lambda make: make.__name__)
def test_exact_kl_with_and_without_logits(make: Callable[[], Any], side: str) -> None:
    torch.manual_seed(0)
    policy, other = wrap(make()), wrap(make())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rollout = make_rollout(side, seq2seq=policy.config.is_encoder_decoder)
    got = evaluate_exact_kl(policy, lambda: nullcontext(other), rollout, temperature=0.7)
    with torch.no_grad():
        p, q = (evaluate(m, rollout, return_logits=True).logits.double() for m in (policy, other))
    expected = exact_kl(p, q, temperature=0.7)
    assert_close(got[rollout.mask], expected[rollout.mask].float(), tol=1e-5)
    assert got[rollout.mask].min() > 1e-4
    assert got.shape == rollout.mask.shape and got.isfinite().all() and not got.requires_grad


def test_exact_kl_of_an_adapter_to_the_model_without_it() -> None:
    policy = wrap(lora(tiny_gpt2()))
    rollout = make_rollout("left")
    assert not evaluate_exact_kl(policy, lambda: reference_mode(policy), rollout).any()
    stir(policy)
    got = evaluate_exact_kl(policy, lambda: reference_mode(policy), rollout)
    with torch.no_grad():
        p = evaluate(policy, rollout, return_logits=True).logits
        with reference_mode(policy) as plain:
            q = evaluate(plain, rollout, return_logits=True).logits
    assert_close(got[rollout.mask], exact_kl(p, q)[rollout.mask], tol=1e-5)
    assert got[rollout.mask].min() > 0


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.kernel
def test_there_are_never_logits_of_all_tokens() -> None:
    words, tokens = 40_000, 600
    config = transformers.LlamaConfig(**_SIZES | {"vocab_size": words, "tie_word_embeddings": True})
    model = wrap(transformers.LlamaForCausalLM(config))
    ids = torch.arange(2 * tokens).view(2, tokens)
    mask = torch.ones(2, tokens - 1, dtype=torch.bool)
    rollout = Rollout(tokens=ids, attention=torch.ones_like(ids).bool(), mask=mask)
    abilities(model)
    with Largest() as seen:
        got = evaluate(model, rollout, entropy=True, response_only=True)
        got.logprobs.sum().backward()
    with Largest() as exact:
        evaluate_exact_kl(model, lambda: nullcontext(model), rollout)
    assert exact.largest <= 4 * 2**20
    assert seen.largest <= 40_000 * 16 + 4 * 2**20  # a gradient of the embedding, or a block; logits were 48 million
    assert seen.largest < words * tokens / 10
