"""Layers that are run again in the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora
from tests.trainer.conftest import make_batch, make_trainer  # noqa: F401  (fixtures)
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models import evaluate
from trl.models.recompute import LayerForward, recompute_activations
from trl.types import Rollout

BUILDERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5, "lora": lambda **more: lora(tiny_gpt2(**more))}


def policy(name: str, **overrides: Any) -> Any:
    kind = AutoModelForSeq2SeqLMWithValueHead if name == "t5" else AutoModelForCausalLMWithValueHead
    base = BUILDERS[name](**overrides)
    torch.manual_seed(0)
    return kind.from_pretrained(base, summary_dropout_prob=0.0)


def rollout(name: str, rows: int = 3, width: int = 12) -> Rollout:
    tokens = torch.randint(3, 61, (rows, width), generator=torch.Generator().manual_seed(0))
    attention = torch.ones(rows, width, dtype=torch.bool)
    attention[0, 8:] = False
    queries = {"encoder_tokens": tokens[:, :6], "encoder_attention": attention[:, :6]} if name == "t5" else {}
    return Rollout(tokens=tokens, attention=attention, mask=attention[:, 1:], **queries)


def gradients(model: Any, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """Of the sum of log-probabilities and values; and the bytes of activations that were kept for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = evaluate(model, rollout(name))
    (result.logprobs.sum() + result.values.sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", BUILDERS)
def test_layers_that_are_run_again_give_the_same_gradients_with_less_memory(name: str, training: bool) -> None:
    dropout = {"gpt2": {"resid_pdrop": 0.1, "attn_pdrop": 0.1}, "t5": {"dropout_rate": 0.1}}.get(name, {})
    model = policy(name, **dropout).train(training)
    torch.manual_seed(1)
    expected, before = gradients(model, name)
    recompute_activations(model)
    torch.manual_seed(1)
    found, after = gradients(model, name)
    assert expected.keys() == found.keys() and len(found) > 3
    assert all(torch.equal(expected[n], found[n]) for n in found)
    assert after < before / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_with_activation_checkpointing_learns_the_same(
    name: str,
    dtype: str,
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
) -> None:
    seq2seq, weights = name == "t5", []
    for checkpointing in (False, True):
        trainer = make_trainer(model=policy(name), gradient_checkpointing=checkpointing, dtype=dtype)
        trainer.step(*make_batch(seq2seq=seq2seq))
        weights.append(trainer.model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], w) for n, w in policy(name).state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_update_runs_layers_again_and_sampling_keeps_its_cache(
    dtype: str,
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(gradient_checkpointing=True, dtype=dtype, ppo_epochs=1)
    layer = trainer.model.pretrained_model.transformer.h[0]
    seen: list[tuple[bool, int]] = []
    plain = layer.forward.plain

    def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((torch.is_grad_enabled(), x.shape[1]))
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(layer.forward, "plain", watched)
    queries = [torch.tensor([5, 6, 7, 8])] * 2
    trainer.generate(queries, return_prompt=False, max_new_tokens=5, do_sample=True, top_k=0)
    assert {width for _, width in seen[1:]} >= {1}  # one new token at a time
    assert not any(grad for grad, _ in seen)
    seen.clear()
    trainer.step(*make_batch())
    assert sum(grad for grad, _ in seen) == 4  # two minibatches, forward and again backward


def test_a_copy_of_a_model_runs_its_own_layers() -> None:
    model = policy("gpt2")
    recompute_activations(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(1.5)
    forward = clone.pretrained_model.transformer.h[0].forward
    assert isinstance(forward, LayerForward)
    assert forward.plain.__self__ is clone.pretrained_model.transformer.h[0]
    assert clone.state_dict().keys() == policy("gpt2").state_dict().keys()
    expected = policy("gpt2")
    expected.load_state_dict(clone.state_dict())
    assert torch.equal(evaluate(clone, rollout("gpt2")).logprobs, evaluate(expected, rollout("gpt2")).logprobs)


def test_the_model_of_an_earlier_trainer_is_not_checkpointed_twice() -> None:
    model = policy("gpt2")
    recompute_activations(model)
    first = model.pretrained_model.transformer.h[0].forward
    recompute_activations(model)
    assert model.pretrained_model.transformer.h[0].forward is first


def test_an_architecture_without_such_layers_is_named(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    model = policy("gpt2")
    monkeypatch.setattr(type(model.pretrained_model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not support activation checkpointing"):
        make_trainer(model=model, gradient_checkpointing=True)
