"""`OnlineTrainer`: an algorithm without a critic through `step` and through managed runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import assert_close, tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora
from tests.trainer.managed import HELD_OUT, PROMPTS, bits, words
from trl import AutoModelForCausalLMWithValueHead, OnlineTrainer, PPOConfig
from trl.algorithms import KLPenalty, grpo
from trl.functional import k1
from trl.rollout import LocalEngine, rollout_rows
from trl.trackers import read_completions, read_metrics
from trl.types import Sampling

QUERIES = [torch.tensor([5, 6, 7])] * 4 + [torch.tensor([8, 9])] * 4
RESPONSES = [torch.tensor([10 + i, 20 + i, 30 + i][: 1 + i % 3]) for i in range(8)]
SCORES = [torch.tensor(float(i % 4)) for i in range(8)]


def make(model: Any = None, algorithm: Any = None, **settings: Any) -> OnlineTrainer:
    config = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3, "group_size": 4}
    return OnlineTrainer(
        PPOConfig(**(config | settings)),
        tiny_gpt2() if model is None else model,
        tokenizer=tiny_tokenizer(),
        algorithm=grpo() if algorithm is None else algorithm,
    )


def test_a_step_learns_and_says_so_under_its_name() -> None:
    trainer = make()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    assert {"grpo/loss/policy", "grpo/loss/kl", "grpo/loss/total", "grpo/grad_norm", "objective/kl"} <= set(stats)
    assert not any(key.startswith("ppo/") or "val/" in key for key in stats) and "objective/kl_coef" not in stats
    assert stats["objective/kl"] == 0.0  # the reference is where training starts
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved and not any("v_head" in name for name in moved)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"] != 0.0


def test_equal_queries_are_a_group() -> None:
    trainer = make()
    trainer.step([*QUERIES[4:], *QUERIES[:4]], RESPONSES, SCORES)
    experience = trainer.last_experience
    assert experience is not None
    group = experience.rollout.group
    assert len(group.unique()) == 2 and len(group[:4].unique()) == 1
    per_response = experience.advantages.sum(dim=1) / experience.rollout.mask.sum(dim=1)
    expected = (torch.arange(4.0) - 1.5) / (torch.arange(4.0).std() + 1e-4)
    assert_close(per_response, torch.cat([expected, expected]))


@pytest.mark.parametrize("kl_coef", [0.04, 0.0])
def test_only_a_penalty_needs_a_reference(kl_coef: float) -> None:
    trainer = make(algorithm=grpo(kl_coef=kl_coef))
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    assert (trainer.ref_model is None) == (kl_coef == 0.0) == ("objective/kl" not in stats)
    assert (trainer.reference_kl(QUERIES, RESPONSES) is None) == (kl_coef == 0.0)


def test_models_of_every_kind() -> None:
    trainer = make(AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()))
    assert not any(p.requires_grad for p in trainer.model.v_head.parameters())
    trainer.step(QUERIES, RESPONSES, SCORES)
    adapted = make(lora(tiny_gpt2()))
    assert adapted.is_peft_model and adapted.ref_model is None
    assert adapted.step(QUERIES, RESPONSES, SCORES)["objective/kl"] == 0.0
    seq2seq = make(tiny_t5())
    stats = seq2seq.step(QUERIES, [torch.cat([torch.tensor([0]), r]) for r in RESPONSES], SCORES)
    assert stats["grpo/grad_norm"] > 0


def test_what_is_saved_is_a_plain_language_model(tmp_path: Path) -> None:
    trainer = make()
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(tmp_path)
    assert not (tmp_path / "v_head.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, p in trainer.model.pretrained_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], p), name


def test_settings_of_ppo_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma, cliprange: only PPO uses these settings; grpo"):
        make(gamma=0.9, cliprange=0.1)
    with pytest.raises(ValueError, match="algorithm must be given"):
        OnlineTrainer(PPOConfig(batch_size=8), tiny_gpt2(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="algorithm='grpo' must be one such as"):
        make(algorithm="grpo")
    with pytest.raises(ValueError, match="must be language models, not str: load them with transformers'"):
        make("gpt2")
    with pytest.raises(ValueError, match="batch_size=8 is not a multiple of group_size=3"):
        make(group_size=3)


def train(trainer: OnlineTrainer, folder: Path, steps: int, **more: Any) -> Any:
    return trainer.train(
        PROMPTS, reward=words, steps=steps, run_dir=folder, generation={"max_new_tokens": 5}, progress=False, **more
    )


def test_a_run_samples_groups_and_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = make()
    train(whole, tmp_path / "whole", 4, eval_prompts=HELD_OUT, save_every=1)
    for step in range(1, 5):
        samples = read_completions(tmp_path / "whole", step)
        prompts = [sample["prompt"] for sample in samples]
        assert len(samples) == 8 and all(len(set(prompts[i : i + 4])) == 1 for i in (0, 4)) and len(set(prompts)) == 2
    first = make()
    train(first, tmp_path / "parts", 2, eval_prompts=HELD_OUT, save_every=1)
    second = make()
    train(second, tmp_path / "parts", 4, resume=True, eval_prompts=HELD_OUT, save_every=1)
    assert bits(second) == bits(whole)
    for a, b in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True):
        same = {k for k in a if "time/" not in k and "memory/" not in k and not k.startswith("eval/")}
        assert {k: a[k] for k in same} == {k: b[k] for k in same}


def test_a_run_without_a_reference(tmp_path: Path) -> None:
    trainer = make(algorithm=grpo(kl_coef=0.0))
    train(trainer, tmp_path / "run", 2, eval_prompts=HELD_OUT)
    rows = read_metrics(tmp_path / "run")
    assert "objective/kl" not in rows[-1] and rows[-1]["eval/score_mean"] is not None
    assert all(sample["kl"] is None for sample in read_completions(tmp_path / "run", 1))


def test_another_kl_is_one_word(tmp_path: Path) -> None:
    trainer = make(algorithm=replace(grpo(), name="mine", kl=KLPenalty(estimator=k1, coef=0.1)))
    assert "mine/loss/kl" in trainer.step(QUERIES, RESPONSES, SCORES)


def engine_of(trainer: Any) -> LocalEngine:
    return LocalEngine(trainer.model.pretrained_model, pad_token=0, batch_size=8)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_a_rollout_takes_the_place_of_queries_and_responses(make_trainer: Any, seq2seq: bool) -> None:
    queries = [torch.tensor([5, 6, 7][: 1 + i % 3]) for i in range(4)]
    scores = [torch.tensor(float(i)) for i in range(4)]
    stats = []
    for whole in (True, False):
        trainer = make_trainer(seq2seq=seq2seq)
        with torch.no_grad():
            rollout = engine_of(trainer).generate(queries, Sampling(limits=(4, 5, 6, 3), seed=1))
        rollout = replace(rollout, sampler_logprobs=rollout.sampler_logprobs - 0.3)
        if whole:
            stats.append(trainer.step(rollout=rollout, scores=scores))
        else:
            rows, responses = rollout_rows(rollout)
            seen = [row[mask] for row, mask in zip(rollout.sampler_logprobs, rollout.mask, strict=True)]
            if seq2seq:
                seen = [torch.cat([torch.zeros(1), row]) for row in seen]
            stats.append(trainer.step(rows, responses, scores, sampler_logprobs=seen))
    names = [name for name in stats[0] if "time/" not in name and "memory/" not in name]
    assert all(np.array_equal(stats[0][name], stats[1][name]) for name in names)
    assert abs(stats[0]["objective/sampler_gap"] - 0.3) < 1e-4


def test_a_rollout_that_cannot_be_taken(make_trainer: Any) -> None:
    trainer = make_trainer()
    queries, scores = [torch.tensor([5, 6])] * 4, [torch.tensor(1.0)] * 4
    rollout = engine_of(trainer).generate(queries, Sampling(limits=(4,) * 4, seed=1))
    with pytest.raises(ValueError, match="pass either rollout, or queries and responses"):
        trainer.step(queries, queries, scores, rollout=rollout)
    with pytest.raises(ValueError, match="queries"):
        trainer.step(scores=scores)
    holed = rollout.mask.clone()
    holed[1, holed[1].nonzero()[-1]] = False
    with pytest.raises(ValueError, match="the mask of row 1 covers"):
        trainer.step(rollout=replace(rollout, mask=holed), scores=scores)
    with pytest.raises(ValueError, match="scores"):
        trainer.step(rollout=rollout)


def test_groups_of_a_rollout_are_its_own() -> None:
    trainer = make(algorithm=grpo(kl_coef=0.0))
    rollout = engine_of(trainer).generate(QUERIES, Sampling(limits=(4,) * 8, seed=1))
    group = torch.tensor([0, 1] * 4)
    trainer.step(rollout=replace(rollout, group=group, sampler_logprobs=None), scores=SCORES)
    assert trainer.last_experience is not None and torch.equal(trainer.last_experience.rollout.group, group)


def test_groups_of_an_engine_are_those_of_equal_queries() -> None:
    trainer = make(algorithm=grpo(kl_coef=0.0))
    rollout = engine_of(trainer).generate(QUERIES, Sampling(limits=(4,) * 8, seed=1))
    assert len(rollout.group.unique()) == 2
    trainer.step(rollout=rollout, scores=SCORES)
    assert trainer.last_experience is not None and bool(trainer.last_experience.advantages.any())
    prepared = trainer.prepare(rollout=rollout, scores=SCORES, group=[0, 1] * 4)
    assert prepared.experience.rollout.group.tolist() == [0, 1] * 4
    with pytest.raises(ValueError, match="group"):
        trainer.prepare(rollout=rollout, scores=SCORES, group=[0])


def test_responses_that_are_alone_are_warned_of() -> None:
    trainer = make(algorithm=grpo(kl_coef=0.0), group_size=1)
    with pytest.warns(UserWarning, match=r"every response is the only one to its prompt.*group_size"):
        trainer.step([torch.tensor([5 + i]) for i in range(8)], RESPONSES, SCORES)


def test_what_an_algorithm_has_no_use_for_is_refused() -> None:
    with pytest.raises(ValueError, match="grpo has no KL penalty: leave ref_model and num_shared_layers out"):
        OnlineTrainer(PPOConfig(batch_size=8), tiny_gpt2(), tiny_gpt2(), tiny_tokenizer(), algorithm=grpo(kl_coef=0.0))


def test_another_algorithm_is_another_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(make(), tmp_path / "run", 1, save_every=1)
    with caplog.at_level("WARNING"):
        train(make(algorithm=grpo(clip_range=0.5)), tmp_path / "run", 2, save_every=1, resume=True)
    assert "algorithm.surrogate was clipped_surrogate(low=0.2, high=0.2), is clipped_surrogate(low=0.5" in caplog.text
    with pytest.raises(ValueError, match="the algorithm was grpo, is mine"):
        train(make(algorithm=replace(grpo(), name="mine")), tmp_path / "run", 3, resume=True)
    with pytest.raises(ValueError, match="group_size was 4, is 2"):
        train(make(group_size=2), tmp_path / "run", 3, resume=True)
    assert "clipped_surrogate" in (tmp_path / "run/config.resolved.yaml").read_text(encoding="utf-8")


def test_the_card_names_the_algorithm(tmp_path: Path) -> None:
    trainer = make()
    trainer.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "grpo, a policy gradient without a critic" in card and "- grpo" in card and "clipped_surrogate" in card
    assert "ValueHead" not in card and "value head" not in card and "PPO" not in card


def test_a_step_refused_by_design_is_an_event_and_no_dump(tmp_path: Path) -> None:
    trainer = make(ratio_threshold=0.5)
    with pytest.warns(UserWarning, match="above ratio_threshold=0.5"):
        train(trainer, tmp_path / "run", 1)
    assert not list((tmp_path / "run").glob("dumps/*"))
    assert "above ratio_threshold=0.5" in (tmp_path / "run/events.log").read_text(encoding="utf-8")
