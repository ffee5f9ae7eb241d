"""`score_while_sampling`: what `generate` computed about its tokens stands in for the policy's scoring pass."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_gpt2, tiny_llama
from tests.models.lora import lora, stir
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.trainer.policy_sampler import ResponseCache
from trl.training import evaluator
from trl.types import Rollout

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


def attention(trainer: PPOTrainer) -> Any:
    """That of the second layer of a LoRA model."""
    return trainer.model.pretrained_model.base_model.model.transformer.h[1].attn


# Ways to change what a LoRA policy computes.
CHANGES: dict[str, Any] = {
    "a weight": lambda t: attention(t).c_attn.base_layer.weight[3, 5].add_(0.5),
    "a weight of the adapter": lambda t: attention(t).c_attn.lora_A["default"].weight[0].add_(1),
    "another parameter": lambda t: setattr(
        attention(t).c_proj, "weight", torch.nn.Parameter(attention(t).c_proj.weight * 2)
    ),
    "an optimizer of one's own": lambda t: optimize(t.model),
    "another adapter": lambda t: t.model.pretrained_model.set_adapter("other"),
    "the adapter's scale": lambda t: attention(t).c_attn.scaling.update(default=7.0),
    "the value head": lambda t: t.model.v_head.summary.weight[0, 0].add_(1),
    "loaded weights": lambda t: t.model.load_state_dict({k: v * 1.1 for k, v in t.model.state_dict().items()}),
}


def optimize(model: torch.nn.Module) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(trained, lr=1e-3).step()


@pytest.mark.parametrize("how", ["nothing", "modes", *CHANGES])
def test_a_change_that_torch_counts_is_seen(make_trainer: Any, make_batch: Any, passes: list[bool], how: str) -> None:
    queries, _, scores = make_batch()
    model = lora(tiny_gpt2())
    model.add_adapter("other", model.peft_config["default"])
    stir(model)
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
    trainer = make_trainer(model=wrapper, score_while_sampling=True)
    responses = rollout(trainer, queries)
    if how == "modes":  # dropout is off while tokens are sampled and while they are scored, whatever the mode is
        trainer.model.train(not trainer.model.training)
    elif how != "nothing":
        with torch.no_grad():
            CHANGES[how](trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* parameters, such as .* became trainable after the trainer was built")
        trainer.step(queries, responses, scores)
    assert passes == ([False] if how in ("nothing", "modes") else [True, False])


def test_an_adapter_that_was_off_for_one_call_of_generate(
    make_trainer: Any, make_batch: Any, passes: list[bool]
) -> None:
    queries, _, scores = make_batch()
    model = lora(tiny_gpt2())
    stir(model)
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
    trainer = make_trainer(model=wrapper, score_while_sampling=True)
    with model.disable_adapter():
        responses = rollout(trainer, queries)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


def test_a_buffer_that_changed(make_trainer: Any, make_batch: Any, passes: list[bool]) -> None:
    queries, _, scores = make_batch()
    wrapper = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama(), summary_dropout_prob=0.0)
    trainer = make_trainer(model=wrapper, score_while_sampling=True)
    responses = rollout(trainer, queries)
    trainer.model.pretrained_model.model.rotary_emb.inv_freq.mul_(0.5)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


def test_weights_that_were_others_for_one_call_of_generate(
    make_trainer: Any, make_batch: Any, passes: list[bool]
) -> None:
    """Averaged weights are put in place, sampled from, and taken out again."""
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    rollout(trainer, queries)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.9)
        responses = rollout(trainer, queries)
        for parameter, value in zip(trainer.model.parameters(), before, strict=True):
            parameter.copy_(value)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


def test_a_checkpoint_that_was_loaded_between(
    make_trainer: Any, make_batch: Any, passes: list[bool], tmp_path: Path
) -> None:
    queries, _, scores = make_batch()
    trainer = make_trainer(score_while_sampling=True)
    trainer.save_checkpoint(tmp_path)
    responses = rollout(trainer, queries)
    trainer.load_checkpoint(tmp_path)
    trainer.step(queries, responses, scores)
    assert passes == [True, False]


@pytest.mark.parametrize("seq2seq", [False, True])
def test_copies_and_slices_are_known_by_their_tokens(
    make_trainer: Any, make_batch: Any, passes: list[bool], seq2seq: bool
) -> None:
    queries, _, scores = make_batch(seq2seq=seq2seq)
    trainer = make_trainer(seq2seq=seq2seq, score_while_sampling=True)
    torch.manual_seed(3)
    found = trainer.generate(queries, **SAMPLING)
    responses = [r.clone() if seq2seq else r[len(q) :] for q, r in zip(queries, found, strict=True)]
    single = trainer.generate(queries[0], **SAMPLING)[0]
    responses[0] = torch.tensor((single if seq2seq else single[len(queries[0]) :]).tolist())
    trainer.step([query.clone() for query in queries], responses, scores)
    assert passes == [False]


def test_what_is_kept_and_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, state = ResponseCache(), (1.0, 2)
    words, numbers = [torch.tensor([i]) for i in range(5)], torch.arange(5.0)[:, None]

    def keep(state: Any, queries: list[Tensor], responses: list[Tensor]) -> None:
        tokens = torch.stack([torch.cat(pair) for pair in zip(queries, responses, strict=True)])
        mask = torch.zeros(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
        mask[:, -1] = True
        table = torch.full(mask.shape, torch.nan)
        table[:, -1:] = numbers[: len(tokens)]
        ones = torch.ones_like(tokens, dtype=torch.bool)
        found = Rollout(tokens=tokens, attention=ones, mask=mask, sampler_logprobs=table, values=table + 10)
        seen.add(state, found)

    keep(state, words, words)
    found = seen.find(state, words[3:], words[3:])
    assert found is not None and [[row.tolist() for row in rows] for rows in found] == [[[3], [4]], [[13], [14]]]
    assert seen.find(state, words, words[::-1]) is None
    assert seen.find((1.0, 3), words[3:], words[3:]) is None
    # Where a query ends and its response begins is part of what was sampled.
    keep(state, [torch.tensor([7, 8])], words[:1])
    assert seen.find(state, [torch.tensor([7, 8])], words[:1]) is not None
    assert seen.find(state, [torch.tensor([7])], [torch.tensor([8, 0])]) is None
    monkeypatch.setattr("trl.trainer.policy_sampler._MAX_CACHED_RESPONSES", 3)
    keep(state, words[:1], words[:1])
    assert seen.find(state, words[1:2], words[1:2]) is None
    assert seen.find(state, words[3:], words[3:]) is not None
    seen.clear()
    assert seen.find(state, words[3:], words[3:]) is None
    keep(state, words, words)
    keep((2.0, 2), words[:1], words[:1])
    assert seen.find(state, words[3:], words[3:]) is None
    assert seen.find((2.0, 2), words[3:], words[3:]) is None


@pytest.mark.parametrize("name", ["keep_memory", "score_while_sampling", "gradient_checkpointing"])
@pytest.mark.parametrize("value", ["false", 1, None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} must be True or False"):
        PPOConfig(**{name: value})
