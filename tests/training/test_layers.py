"""Layers that are run again in the backward pass, and layers that are compiled."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_llama, tiny_t5
from tests.models.lora import lora
from tests.trainer.conftest import make_batch, make_trainer  # noqa: F401  (fixtures)
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from trl.models import evaluate
from trl.models.recompute import CompiledCode, LayerForward, compiled_layers, recompute_activations
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
    assert isinstance(forward, LayerForward) and forward.layer is clone.pretrained_model.transformer.h[0]
    assert forward.plain.__self__ is forward.layer
    assert clone.state_dict().keys() == policy("gpt2").state_dict().keys()
    expected = policy("gpt2")
    expected.load_state_dict(clone.state_dict())
    assert torch.equal(evaluate(clone, rollout("gpt2")).logprobs, evaluate(expected, rollout("gpt2")).logprobs)


def test_an_architecture_without_such_layers_is_named(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    model = policy("gpt2")
    monkeypatch.setattr(type(model.pretrained_model), "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not support activation checkpointing"):
        make_trainer(model=model, gradient_checkpointing=True)


# Compiled ----------------------------------------------------------------------------------------------------------------


def refuse(kind: type[Exception]) -> Any:
    def compiler(forward: Any, **_: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise kind("no code today")

        return fail

    return compiler


def test_where_compiling_fails_layers_run_as_they_are_and_the_log_says_why(
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    plain = make_trainer()
    plain.step(*make_batch())
    monkeypatch.setattr("torch.compile", refuse(InternalTorchDynamoError))
    with caplog.at_level(logging.WARNING, logger="trl.models.recompute"):
        trainer = make_trainer(compile=True)
        trainer.step(*make_batch())
    reasons = [r.getMessage() for r in caplog.records if r.name == "trl.models.recompute"]
    assert reasons == ["compile=True has no effect: InternalTorchDynamoError: no code today"]
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))


def test_an_error_of_the_computation_is_not_taken_for_one_of_the_compiler(
    make_trainer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.compile", refuse(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        make_trainer(compile=True)


def test_wrong_numbers_are_not_relied_on(
    make_trainer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "torch.compile", lambda forward, **_: lambda layer, x, *a, **k: forward(layer, 1.01 * x, *a, **k)
    )
    with caplog.at_level(logging.WARNING, logger="trl.models.recompute"):
        trainer = make_trainer(compile=True)
    assert "gradients differ by" in caplog.text and "is allowed" in caplog.text
    assert trainer.model.pretrained_model.transformer.h[0].forward.code.off


def test_transformers_own_checkpointing_is_not_compiled_away() -> None:
    from trl.models.recompute import CompileError

    model = policy("gpt2")
    model.pretrained_model.transformer.h[0].gradient_checkpointing = True
    with pytest.raises(CompileError, match=r"PPOConfig\.gradient_checkpointing in its place"):
        compiled_layers(model, CompiledCode())
    assert "forward" not in model.pretrained_model.transformer.h[0].__dict__


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_compiled_step_learns_the_same_up_to_rounding(
    name: str,
    more: dict[str, Any],
    make_trainer: Any,  # noqa: F811
    make_batch: Any,  # noqa: F811
) -> None:
    from torch._dynamo.utils import counters

    stats, trainers = [], []
    for compiled in (False, True):
        trainers.append(make_trainer(model=policy(name), compile=compiled, learning_rate=1e-4, ppo_epochs=2, **more))
        counters.clear()
        stats.append([trainers[-1].step(*make_batch(seq2seq=name == "t5", seed=seed)) for seed in (0, 1)])
        first = counters["stats"]["unique_graphs"]
        stats[-1].append(trainers[-1].step(*make_batch(seq2seq=name == "t5", seed=2)))
        assert counters["stats"]["unique_graphs"] == first  # nothing is compiled anew from step to step
    tolerance = 0.1 if "dtype" in more else 1e-3
    for plain, fast in zip(*stats, strict=True):
        for key in ("ppo/loss/value", "ppo/loss/policy", "objective/entropy", "ppo/policy/entropy"):
            assert abs(plain[key] - fast[key]) <= tolerance * (1 + abs(plain[key])), key
    assert trainers[0].model.state_dict().keys() == trainers[1].model.state_dict().keys()
    code = {id(m.forward.code): m.forward.code for m in trainers[1].model.modules() if "forward" in m.__dict__}
    assert len(code) == 1 and not any(c.off for c in code.values())


WITHOUT_A_COMPILER = """
import logging, warnings
import torch
from tests.helpers import tiny_gpt2, tiny_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

warnings.simplefilter("ignore")
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
trainer = PPOTrainer(PPOConfig(batch_size=1, compile=True), model, tokenizer=tiny_tokenizer())
trainer.step([torch.tensor([5, 6])], [torch.tensor([7, 8])], [torch.tensor(1.0)])
print("learnt")
"""


@pytest.mark.slow
def test_without_a_compiler_layers_run_as_they_are(tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.endswith("learnt\n"), done.stderr
    reasons = [line for line in done.stderr.splitlines() if line.startswith("trl.models.recompute:")]
    assert len(reasons) == 1 and "compile=True has no effect" in reasons[0] and "/nowhere/g++" in reasons[0]
