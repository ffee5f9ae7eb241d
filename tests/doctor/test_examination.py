"""`examine` and `examine_run`: what they take, what they leave unchanged, and findings that need no page."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_tokenizer
from tests.trainer.managed import GENERATION, PROMPTS, bits, fresh, run, words
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, assets, create_reference_model
from trl.algorithms import grpo
from trl.doctor import CODES, examine, examine_run
from trl.doctor.batch_checks import check_scores
from trl.doctor.setting_checks import check_settings, pretraining_rate
from trl.doctor.watch import expects_end
from trl.trackers import Finding, RunDirectory
from trl.trainer import OnlineTrainer


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


@pytest.mark.parametrize("case", ["full", "lora", "seq2seq", "full bfloat16", "lora bfloat16"])
def test_an_examination_changes_nothing(case: str) -> None:
    """Dropout is on, so that a pass in training mode would draw."""
    trainer = fresh(case, learning_rate=1e-3)
    run(trainer, steps=1)
    before, modes = bits(trainer), [m.training for m in trainer.model.modules()]
    generators = random.getstate(), torch.get_rng_state().tolist()
    first = examine(trainer, PROMPTS, words, GENERATION)
    assert first == examine(trainer, PROMPTS, words, GENERATION)
    assert bits(trainer) == before and [m.training for m in trainer.model.modules()] == modes
    assert (random.getstate(), torch.get_rng_state().tolist()) == generators


def test_critic_free_trainers_are_examined_too() -> None:
    trainer = OnlineTrainer(
        PPOConfig(batch_size=16, mini_batch_size=4, group_size=2),
        tiny_gpt2(),
        tokenizer=tiny_tokenizer(),
        algorithm=grpo(),
    )
    assert examine(trainer, PROMPTS, words, GENERATION) == []
    by_prompt = lambda prompts, completions: [float(len(prompt)) for prompt in prompts]  # noqa: E731
    assert codes(examine(trainer, PROMPTS, by_prompt, GENERATION)) == ["constant-groups"]


def test_a_reward_that_scores_too_little_is_found_before_training() -> None:
    def says(unscored: int, constant: bool = False) -> list[str]:
        scores = [None if i < unscored else float(i * (not constant)) for i in range(40)]
        return [f"{found.code}: {found.evidence}" for found in check_scores(scores)]

    assert says(4) == []
    assert says(5) == ["samples-excluded: 5 of 40 responses have no score"]
    assert says(40) == ["samples-excluded: 40 of 40 responses have no score"]
    assert says(0, constant=True) == ["constant-reward: All 40 scores are 0"]
    assert check_scores([]) == check_scores([None] * 7) == []


def test_a_reference_that_became_the_policy() -> None:
    """Made apart, as a trainer demands, and set to the same later."""
    trainer = fresh("plain sgd")
    trainer.ref_model = trainer.model
    (finding,) = [f for f in examine(trainer, PROMPTS, words, GENERATION) if f.code == "reference-is-policy"]
    assert finding.severity == "error" and "shares 28 trained parameters" in finding.evidence
    queries = [torch.tensor([5, 6])] * 4
    with pytest.raises(ValueError, match=r"trainer\.ref_model is trainer\.model"):
        trainer.step(queries, queries, [torch.tensor(1.0)] * 4)


def test_own_responses_are_examined() -> None:
    trainer = fresh("plain sgd")
    trainer.model.eval()
    queries = [torch.tensor([40 + i, 50]) for i in range(20)]
    responses = [torch.randint(4, 60, (12,)) for _ in queries]  # not the policy's; it is nearly uniform, as these are
    assert examine(trainer, queries, responses=responses, scores=list(range(20))) == []
    always = [torch.full((12,), 7) for _ in queries]
    for _ in range(30):  # w7 becomes likely, and so unlike what was sampled
        logits = trainer.model(torch.stack([torch.cat(pair) for pair in zip(queries, always)]))[0]
        loss = -logits.log_softmax(-1)[:, 1:, 7].mean()
        loss.backward()
        torch.optim.SGD(trainer.model.parameters(), lr=0.5).step()
        trainer.model.zero_grad()
    assert "sampler-mismatch" in codes(examine(trainer, queries, responses=responses))
    # Declared to be another distribution's, as they are: nothing to say of the entropy, but of the gap.
    told = [torch.full((12,), -4.1) for _ in queries]
    assert "sampler-mismatch" not in codes(examine(trainer, queries, responses=responses, sampler_logprobs=told))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [1.0]}, "scores and sampler_logprobs belong to responses"),
        ({"responses": [torch.tensor([5])]}, "there are 10 prompts, but 1 responses and no scores"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens=0 must be"),
        ({"prompts": []}, "there are no prompts"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examine(fresh("plain sgd"), **({"prompts": PROMPTS, "generation": GENERATION} | arguments))


def test_the_rate_of_pretraining() -> None:
    """Worked out by hand: ln(1e8) = 18.42; GPT-3's table has 6e-4 at 125 million."""
    assert pretraining_rate(10**8) == pytest.approx(6.69e-4, rel=1e-3)
    assert pretraining_rate(10**12) == 1e-4


def rate_findings(trainer: Any) -> list[str]:
    return [finding.severity for finding in check_settings(trainer, [], {}) if finding.code == "learning-rate"]


@pytest.mark.parametrize(
    ("case", "rate", "severity"),
    [
        ("narrow moments", 8e-3, []),  # of 8,609 parameters
        ("narrow moments", 5e-2, []),  # at which it has learnt
        ("narrow moments", 1.0, ["error"]),
        ("lora", 1.0, ["error"]),
        ("plain sgd", 1.0, []),  # whose scale is another
    ],
)
def test_learning_rates_of_small_models(case: str, rate: float, severity: list[str]) -> None:
    trainer = fresh(case)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    assert rate_findings(trainer) == severity


@pytest.mark.parametrize(("rate", "severity"), [(1e-5, []), (1e-3, []), (5e-3, ["warning"]), (1.0, ["error"])])
def test_learning_rates_by_size(rate: float, severity: list[str]) -> None:
    """1.9 million parameters: pretraining takes 0.0012, and three times that is the bound."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(assets.path("tiny-gpt2-reviews"))
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, learning_rate=rate), model, create_reference_model(model), tiny_tokenizer()
    )
    assert rate_findings(trainer) == severity
    if rate == 5e-3:
        model.is_peft_model = True  # ten times more for an adapter
        assert rate_findings(trainer) == []


def test_a_value_head_may_have_a_rate_of_its_own_and_a_warm_up_begins_at_zero() -> None:
    trainer = fresh("narrow moments")
    head = list(trainer.model.v_head.parameters())
    trunk = [p for p in trainer.model.parameters() if all(p is not h for h in head)]
    trainer.optimizer = torch.optim.Adam([{"params": trunk, "lr": 1e-3}, {"params": head, "lr": 1.0}])
    assert rate_findings(trainer) == []
    trainer.optimizer.param_groups[0] |= {"lr": 0.0, "initial_lr": 1.0}
    assert rate_findings(trainer) == ["error"]


def test_chats_are_meant_to_end() -> None:
    trainer = fresh("plain sgd")
    prompts = [type("Prompt", (), {"text": text})() for text in ("w40 w50 w10", "w41")]
    assert not expects_end(trainer, prompts, {})
    assert expects_end(trainer, prompts, {"stop_strings": ["w9"]})
    trainer.tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %} w10{% endif %}"
    assert expects_end(trainer, prompts, {})
    assert not expects_end(trainer, prompts[1:], {})
    trainer.tokenizer.chat_template = "{{ raise_exception('only with a system message') }}"
    assert not expects_end(trainer, prompts, {})


def test_a_run_is_examined_from_its_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run folder: it contains no metrics\.jsonl"):
        examine_run(tmp_path)
    with warnings.catch_warnings(), RunDirectory.create(tmp_path / "run") as folder:
        folder.write_config({"ppo": {"target": 6.0, "adap_kl_ctrl": True}})
        for step in range(1, 13):
            folder.log({"score/mean": 0.5, "score/std": 0.1, "ppo/policy/clipfrac": 0.4, "objective/kl": 20.0}, step)
        assert codes(examine_run(folder.path)) == ["clip-fraction", "kl-above-target"]
        early = Finding(step=0, code="dropout-on", severity="warning", title="a", evidence="b", remedy="c")
        known = Finding(step=5, code="clip-fraction", severity="warning", title="a", evidence="b", remedy="c")
        folder.finding(early)
        folder.finding(known)
    found = examine_run(tmp_path / "run")
    assert found[:2] == [early, known] and codes(found[2:]) == ["kl-above-target"]


def test_every_code_reads_as_a_sentence() -> None:
    for code, (title, remedy, severity) in CODES.items():
        assert code == code.lower() and " " not in code and severity in ("warning", "error")
        assert title.endswith(".") and remedy.endswith(".")
