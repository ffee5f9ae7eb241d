"""`score_while_sampling`: what `generate` computed about its tokens stands in for the policy's scoring pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.lora import lora, stir
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.trainer.recall import Recall, state_of
from trl.training import evaluator

SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 6}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every scoring pass, whether it is one of the policy."""
    made: list[bool] = []
    plain = evaluator.evaluate_in_batches

    def score(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["values"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(evaluator, "evaluate_in_batches", score)
    return made


def rollout(trainer: PPOTrainer, queries: list[Tensor], **more: Any) -> list[Tensor]:
    torch.manual_seed(3)
    found = trainer.generate(queries, return_prompt=False, batch_size=2, **{**SAMPLING, **more})
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_same_numbers_without_the_pass(
    make_trainer: Any, make_batch: Any, passes: list[bool], seq2seq: bool, dtype: str
) -> None:
    queries, _, scores = make_batch(seq2seq=seq2seq)
    queries[1] = queries[0]
    found = []
    for reuse in (False, True):
        trainer = make_trainer(seq2seq=seq2seq, score_while_sampling=reuse, temperature=0.7, dtype=dtype)
        responses = rollout(trainer, queries, temperature=0.7)
        passes.clear()
        stats = trainer.step(queries, responses, scores)
        assert passes == ([False] if reuse else [True, False])
        found.append((stats, trainer.last_experience))
    (plain_stats, plain), (stats, ours) = found
    mask = plain.rollout.mask
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for name in ("old_logprobs", "old_values", "advantages"):
        torch.testing.assert_close(
            getattr(ours, name)[mask], getattr(plain, name)[mask], rtol=tolerance, atol=tolerance
        )
    for name in ("objective/kl", "ppo/loss/policy", "ppo/returns/mean", "objective/entropy"):
        assert stats[name] == pytest.approx(plain_stats[name], abs=10 * tolerance), name
    assert "objective/full_entropy" in plain_stats and "objective/full_entropy" not in stats


def test_a_second_step_needs_new_responses(make_trainer: Any, make_batch: Any, passes: list[bool]) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    responses = rollout(trainer, queries)
    trainer.step(queries, responses, scores)
    passes.clear()
    trainer.step(queries, responses, scores)
    assert passes == [True, False]
    rollout(trainer, queries)
    passes.clear()
    trainer.step(queries, rollout(trainer, queries), scores)
    assert passes == [False]


@pytest.mark.parametrize(
    "more",
    [{"top_k": 5}, {"top_p": 0.5}, {"do_sample": False}, {"temperature": 0.5}, {"num_beams": 2, "do_sample": False}],
)
@pytest.mark.filterwarnings("ignore")
def test_another_distribution_is_not_taken_for_the_policy_s(
    make_trainer: Any, make_batch: Any, passes: list[bool], more: dict[str, Any]
) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    trainer.step(queries, rollout(trainer, queries, **more), scores)
    assert passes == [True, False]


def test_a_response_that_was_not_sampled_so(
    make_trainer: Any, make_batch: Any, passes: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    responses = rollout(trainer, queries)
    responses[2] = torch.cat([responses[2], responses[2][:1]])
    with caplog.at_level("INFO", logger="trl"):
        trainer.step(queries, responses, scores)
        trainer.step(queries, responses, scores)
    assert passes == [True, False] * 2
    assert sum("score_while_sampling" in record.getMessage() for record in caplog.records) == 1


def test_masked_tokens_stay_out(make_trainer: Any, make_batch: Any, passes: list[bool]) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    responses = rollout(trainer, queries)
    masks = [torch.ones(len(r)) for r in responses]
    masks[0][1:3] = 0
    trainer.step(queries, responses, scores, response_masks=masks)
    assert passes == [False]
    assert int(trainer.last_experience.rollout.mask.sum()) == sum(len(r) for r in responses) - 2


def test_a_temperature_that_changed_between(make_trainer: Any, make_batch: Any, passes: list[bool]) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    responses = rollout(trainer, queries)
    trainer.config.temperature = 0.5
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


@pytest.mark.parametrize("how", ["counted", "data", "value head", "fused"])
def test_weights_that_somebody_else_changed(make_trainer: Any, make_batch: Any, passes: list[bool], how: str) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    responses = rollout(trainer, queries)
    weight = next(trainer.model.parameters())
    if how == "counted":
        with torch.no_grad():
            weight[0, 0] += 1
    elif how == "data":
        weight.data += 1
    elif how == "value head":
        with torch.no_grad():
            trainer.model.v_head.summary.bias += 1
    else:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.Adam(trainer.model.parameters(), lr=1e-3, fused=True).step()
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


def attention(trainer: PPOTrainer) -> Any:
    """That of the second layer of a LoRA model."""
    return trainer.model.pretrained_model.base_model.model.transformer.h[1].attn


def edit(tensor: Tensor, change: Any) -> None:
    """Behind torch's back: no version is counted, and the middle one of the numbers stays."""
    middle = float(tensor.data.flatten()[tensor.numel() // 2])
    change(tensor.data)
    tensor.data.view(-1)[tensor.numel() // 2] = middle


# Ways to change what a LoRA policy computes.
CHANGES: dict[str, Any] = {
    "a number": lambda t: edit(attention(t).c_attn.base_layer.weight, lambda w: w[3, 5].add_(0.5)),
    "two signs": lambda t: edit(attention(t).c_attn.base_layer.weight, lambda w: w[3, 5:7].neg_()),
    "two rows": lambda t: edit(attention(t).c_proj.weight, lambda w: w[:2].copy_(w[:2].flip(0))),
    "the adapter": lambda t: edit(attention(t).c_attn.lora_A["default"].weight, lambda w: w[0].add_(1)),
    "the adapter's scale": lambda t: attention(t).c_attn.scaling.update(default=7.0),
    "a number of a module": lambda t: setattr(attention(t), "scaling", 0.1),
    "a number of the configuration": lambda t: setattr(t.model.config, "scale_attn_weights", False),
    "an activation": lambda t: setattr(
        t.model.pretrained_model.base_model.model.transformer.h[0].mlp, "act", torch.nn.ReLU()
    ),
    "a hook": lambda t: attention(t).register_forward_hook(lambda module, args, out: (out[0] * 2, *out[1:])),
    "a hook before": lambda t: attention(t).c_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "a forward": lambda t: setattr(attention(t).c_proj, "forward", lambda x: x),
    "the value head": lambda t: edit(t.model.v_head.summary.weight, lambda w: w[0, 0].add_(1)),
}


@pytest.mark.parametrize("how", ["nothing", "modes", *CHANGES])
def test_whatever_changes_the_numbers_is_seen(make_trainer: Any, make_batch: Any, passes: list[bool], how: str) -> None:
    queries, _, scores = make_batch()
    model = lora(tiny_gpt2())
    stir(model)
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
    trainer = make_trainer(model=wrapper, score_while_sampling=True)
    responses = rollout(trainer, queries)
    if how == "modes":  # dropout is off while tokens are sampled and while they are scored, whatever the mode is
        trainer.model.train(not trainer.model.training)
    elif how != "nothing":
        CHANGES[how](trainer)
    trainer.step(queries, responses, scores)
    assert passes == ([False] if how in ("nothing", "modes") else [True, False])


def test_a_buffer_that_changed(make_trainer: Any, make_batch: Any, passes: list[bool]) -> None:
    queries, _, scores = make_batch()
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama(), summary_dropout_prob=0.0)
    trainer = make_trainer(model=wrapper, score_while_sampling=True)
    responses = rollout(trainer, queries)
    trainer.model.pretrained_model.model.rotary_emb.inv_freq.data.mul_(0.5)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


def test_weights_that_were_others_for_one_call_of_generate(
    make_trainer: Any, make_batch: Any, passes: list[bool]
) -> None:
    """Averaged weights are put in place, sampled from, and taken out again."""
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    rollout(trainer, queries)
    before = [parameter.data.clone() for parameter in trainer.model.parameters()]
    for parameter in trainer.model.parameters():
        parameter.data.mul_(0.9)
    responses = rollout(trainer, queries)
    for parameter, value in zip(trainer.model.parameters(), before, strict=True):
        parameter.data.copy_(value)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2**18 + 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_state_sees_every_number_of_a_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = torch.nn.Module()
    module.register_buffer("numbers", tensor)
    before, flat = state_of(module), tensor.view(-1)
    for place in {0, tensor.numel() // 3, tensor.numel() - 1}:
        kept = flat[place].clone()
        flat[place] = not kept if dtype == torch.bool else -kept
        assert state_of(module) != before
        flat[place] = kept
    assert state_of(module) == before
    module.register_buffer("numbers", tensor.reshape(1, *shape))
    assert state_of(module) != before


def test_a_state_sees_numbers_that_do_not_lie_together() -> None:
    whole = torch.arange(40.0)
    for part in (whole[1:30], whole.view(5, 8).t(), whole[::3]):
        module = torch.nn.Module()
        module.register_buffer("numbers", part)
        before = state_of(module)
        part[1:3] = part[1:3].flip(0)
        assert state_of(module) != before
        part[1:3] = part[1:3].flip(0)
        assert state_of(module) == before


def test_what_is_remembered_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    recall, state = Recall(), (1.0, 2.0)
    words, numbers = [torch.tensor([i]) for i in range(5)], [torch.tensor([float(i)]) for i in range(5)]
    recall.keep(state, words, words, numbers, numbers)
    assert recall.find(state, words[3:], words[3:]) == (numbers[3:], numbers[3:])
    assert recall.find(state, words, words[::-1]) is None
    assert recall.find((1.0, 3.0), words[3:], words[3:]) is None
    # Where a query ends and its response begins is part of what was sampled.
    pair = [torch.tensor([7, 8])]
    recall.keep(state, pair, words[:1], numbers[:1], numbers[:1])
    assert recall.find(state, [torch.tensor([7])], [torch.tensor([8, 0])]) is None
    monkeypatch.setattr("trl.trainer.recall._MOST", 3)
    recall.keep(state, words[:1], words[:1], numbers[:1], numbers[:1])
    assert recall.find(state, words[1:2], words[1:2]) is None
    assert recall.find(state, words[3:], words[3:]) is not None
    recall.forget()
    assert recall.find(state, words[3:], words[3:]) is None


@pytest.mark.parametrize("name", ["keep_memory", "score_while_sampling", "gradient_checkpointing"])
@pytest.mark.parametrize("value", ["false", 1, None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} must be True or False"):
        PPOConfig(**{name: value})
