"""The doctor in a managed run: silent where nothing is wrong, once where something is, and of no effect on the numbers."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.models.lora import lora_config
from tests.trainer.managed import GENERATION, HELD_OUT, PROMPTS, bits, events, fresh, recorded, run, words
from trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    TrainCallback,
    assets,
    create_reference_model,
)
from trl.algorithms import grpo
from trl.core import set_seed
from trl.demo.outcome import DemoSettings
from trl.doctor import UnfitRun, read_findings
from trl.doctor.watch import DoctorWatch
from trl.trackers import read_metrics
from trl.trainer import OnlineTrainer

REVIEWS = assets.path("tiny-gpt2-reviews")


def variety(prompts: Any, completions: Any) -> list[float]:
    return [len(set(completion.split())) / 10 for completion in completions]


def politeness(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float("the" in text) for text in completions]


def demo() -> tuple[Any, Any, dict[str, Any]]:
    """All settings of the demo but the number of steps."""
    settings = DemoSettings()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(REVIEWS)
    config = PPOConfig(
        learning_rate=settings.learning_rate, batch_size=settings.batch_size,
        mini_batch_size=settings.batch_size // settings.minibatches, ppo_epochs=settings.epochs,
        init_kl_coef=settings.kl_coef, target=settings.kl_target, horizon=settings.kl_horizon, vf_coef=settings.vf_coef,
        temperature=settings.temperature, cliprange_value=settings.cliprange_value, lam=settings.lam, max_grad_norm=1.0,
    )  # fmt: skip
    reference = create_reference_model(model, num_shared_layers=settings.shared_layers)
    trainer = PPOTrainer(config, model, reference, AutoTokenizer.from_pretrained(REVIEWS))
    return trainer, variety, {"max_new_tokens": settings.new_tokens}


def readme() -> tuple[Any, Any, dict[str, Any]]:
    """The settings of "Or let it run" in the README, in smaller batches."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(REVIEWS)
    config = PPOConfig(batch_size=8)
    return PPOTrainer(config, model, tokenizer=AutoTokenizer.from_pretrained(REVIEWS)), politeness, {}


def groups(kl_coef: float = 0.2) -> tuple[Any, Any, dict[str, Any]]:
    """A KL penalty that holds the policy at 0.35 nats per token while the score rises from 1.1 to 1.4.

    At GRPO's usual 0.04, `variety` is exploited from about step 16 on: the score stays at 1.5, its best, while the KL goes on
    to 1.6 nats per token and the responses turn into a salad of words, such as "family be lo, flat it as to pick people not
    allow their family never work". The doctor names that (`test_an_exploited_reward_is_no_healthy_run`).
    """
    config = PPOConfig(batch_size=32, mini_batch_size=16, group_size=4, ppo_epochs=1, learning_rate=3e-4)
    trainer = OnlineTrainer(
        config,
        AutoModelForCausalLM.from_pretrained(REVIEWS),
        tokenizer=AutoTokenizer.from_pretrained(REVIEWS),
        algorithm=grpo(kl_coef=kl_coef),
    )
    return trainer, variety, {"max_new_tokens": 16}


def adapter() -> tuple[Any, Any, dict[str, Any]]:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(REVIEWS, peft_config=lora_config(lora_dropout=0.05))
    config = PPOConfig(batch_size=16, mini_batch_size=8, ppo_epochs=2, learning_rate=1e-3)
    return PPOTrainer(config, model, tokenizer=AutoTokenizer.from_pretrained(REVIEWS)), variety, {"max_new_tokens": 16}


def seq2seq() -> tuple[Any, Any, dict[str, Any]]:
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    config = PPOConfig(batch_size=16, mini_batch_size=8, learning_rate=1e-3)
    return PPOTrainer(config, model, tokenizer=tiny_tokenizer()), words, {"max_new_tokens": 8}


def short() -> tuple[Any, Any, dict[str, Any]]:
    """Two tokens, of which the best are found: the entropy goes down and the KL up, as they should.

    From step 16 on every score is 2 and the returns no longer vary, so that the explained variance is about -10 for values
    that miss the returns by 0.15 of 1.9.
    """
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(
        batch_size=32, mini_batch_size=8, ppo_epochs=2, learning_rate=1e-2, init_kl_coef=0.02, adap_kl_ctrl=False,
        max_grad_norm=1.0,
    )  # fmt: skip

    def tens(prompts: Any, completions: Any) -> list[float]:
        return [float(sum(word in ("w10", "w11") for word in completion.split())) for completion in completions]

    return PPOTrainer(config, model, tokenizer=tiny_tokenizer()), tens, {"max_new_tokens": 2}


HEALTHY: dict[str, Any] = {
    "demo": demo,
    "readme": readme,
    "groups": groups,
    "adapter": adapter,
    "seq2seq": seq2seq,
    "short": short,
}
# Steps here, and in the slow set.
STEPS = {
    "demo": (1, 44),
    "readme": (1, 20),
    "groups": (2, 40),
    "adapter": (2, 40),
    "seq2seq": (4, 60),
    "short": (25, 200),
}


def findings_of(name: str, steps: int, tmp_path: Path, **settings: Any) -> Any:
    set_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, reward, generation = HEALTHY[name](**settings)
        prompts = PROMPTS if name in ("seq2seq", "short") else assets.prompts()
        return trainer.train(
            prompts, reward=reward, steps=steps, generation=generation, progress=False, run_dir=tmp_path / name
        )


@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on_healthy_runs(name: str, tmp_path: Path) -> None:
    result = findings_of(name, STEPS[name][0], tmp_path)
    assert result.findings == ()
    assert not (tmp_path / name / "findings.jsonl").exists()
    rows = read_metrics(tmp_path / name)
    if name == "short":  # it has learnt what it was there for
        assert rows[-1]["score/mean"] > 1.2 and rows[-1]["ppo/policy/entropy"] < 0.5 * rows[0]["ppo/policy/entropy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on_long_healthy_runs(name: str, tmp_path: Path) -> None:
    assert findings_of(name, STEPS[name][1], tmp_path).findings == ()


@pytest.mark.slow
def test_an_exploited_reward_is_no_healthy_run(tmp_path: Path) -> None:
    result = findings_of("groups", 24, tmp_path, kl_coef=0.04)
    rows = read_metrics(tmp_path / "groups")
    assert max(row["score/mean"] for row in rows) < rows[15]["score/mean"] + 0.1
    assert rows[-1]["objective/kl"] > 1.2 * rows[15]["objective/kl"]
    assert [(found.code, found.step > 16) for found in result.findings] == [("policy-collapse", True)]


@pytest.mark.parametrize("case", ["full", "lora", "seq2seq"])
def test_the_doctor_changes_no_number(case: str, tmp_path: Path) -> None:
    """With dropout on and rates at which it has something to say, against a run without it."""
    ends = []
    for doctor in (True, False):
        trainer = fresh(case)
        run(trainer, run_dir=tmp_path / str(doctor), doctor=doctor, eval_prompts=HELD_OUT)
        ends.append((bits(trainer), recorded(tmp_path / str(doctor))))
    assert ends[0] == ends[1]


def test_a_finding_is_told_once_and_again_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    constant = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    with caplog.at_level("WARNING", logger="trl.runs.observer"):
        result = run(fresh("plain sgd"), reward=constant, steps=12, run_dir=tmp_path / "run")
    (finding,) = result.findings
    assert (finding.code, finding.step) == ("constant-reward", 8)  # 32 samples
    assert [f"doctor: {finding}"] == [line for line in events(tmp_path / "run") if line.startswith("doctor: ")]
    assert read_findings(tmp_path / "run") == [finding]
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING]
    assert caplog.messages[0] == f"doctor: {finding}"
    title = finding.title.rstrip(".")
    assert caplog.messages[1] == (
        f"the doctor made 1 finding in this run: constant-reward in step 8: {title}. See docs/doctor.md"
    )
    assert '"findings": [\n    "constant-reward"\n  ]' in (tmp_path / "run/summary.json").read_text()


class Stop(TrainCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, step: int, row: Any) -> bool:
        return step == self.step


@pytest.mark.parametrize("stop", [3, 8])
def test_a_resumed_run_finds_what_an_uninterrupted_one_finds(stop: int, tmp_path: Path) -> None:
    constant = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    arguments: dict[str, Any] = {"reward": constant, "steps": 12, "generation": GENERATION}
    run(fresh("plain sgd"), run_dir=tmp_path / "whole", **arguments)
    run(fresh("plain sgd"), run_dir=tmp_path / "run", callbacks=[Stop(stop)], **arguments)
    result = run(fresh("plain sgd"), run_dir=tmp_path / "run", resume="auto", **arguments)
    assert read_findings(tmp_path / "run") == read_findings(tmp_path / "whole") == list(result.findings)
    assert (tmp_path / "run/findings.jsonl").read_bytes() == (tmp_path / "whole/findings.jsonl").read_bytes()


def test_what_can_never_train_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    trainer = fresh("narrow moments", learning_rate=1.0)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    for _ in range(2):  # also where the finding is already on disk
        with pytest.raises(UnfitRun, match=r"(?s)error learning-rate \(step 0\).*Pass doctor=False to train anyway\."):
            run(trainer, run_dir=tmp_path / "run", resume="auto")
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert "failed in step 1: UnfitRun" in events(tmp_path / "run")[-1]
    assert [finding.code for finding in read_findings(tmp_path / "run")] == ["learning-rate"]
    assert run(trainer, run_dir=tmp_path / "run", resume="auto", doctor=False, steps=1).findings == ()


class Broken(DoctorWatch):
    """Raises in one kind of look, or in all."""

    def __init__(self, *looks: str) -> None:
        super().__init__()
        self.looks = looks

    def __getattribute__(self, name: str) -> Any:
        if name in ("begin", "first_batch", "row") and name in object.__getattribute__(self, "looks"):
            raise ZeroDivisionError(f"a defect of {name}; HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz1234567890")
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("looks", [("begin",), ("first_batch",), ("row",), ("begin", "first_batch", "row")])
def test_a_defect_of_the_doctor_ends_no_run(
    looks: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning with the reason; the numbers are those of a run without a doctor."""
    run(fresh("full"), run_dir=tmp_path / "without", doctor=False)
    monkeypatch.setattr("trl.trainer.resumable.DoctorWatch", partial(Broken, *looks))
    with caplog.at_level("WARNING", logger="trl.runs.observer"):
        result = run(fresh("full"), run_dir=tmp_path / "run")
    assert result.steps == 3 and recorded(tmp_path / "run") == recorded(tmp_path / "without")
    first, *rest = [text for text in caplog.messages if "the doctor failed" in text]
    reason = f"the doctor failed (ZeroDivisionError: a defect of {looks[0]}"
    assert first.startswith(reason) and "training goes on" in first and "hf_abc" not in caplog.text
    failures = sum({"begin": 1, "first_batch": 1, "row": 3}[look] for look in looks)
    assert rest == ([f"the doctor failed {failures} times in this run"] if failures > 1 else [])
    assert sum(line.startswith("the doctor failed: ZeroDivisionError") for line in events(tmp_path / "run")) == 1


def test_an_error_of_the_batch_is_seen_before_its_update() -> None:
    """What the first batch shows is told of before a weight has changed."""
    trainer = fresh("full", learning_rate=1e-3)
    with torch.no_grad():
        trainer.model.v_head.summary.weight.mul_(1e4)
    result = run(trainer, steps=1)
    assert [(f.code, f.step) for f in result.findings if f.code == "value-head-scale"] == [("value-head-scale", 0)]
