"""Scripts that use the interface as clients of TRL 0.4 to 0.11 do, each run from end to end."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.clients import framework_subclass as framework
from tests.clients.weights import same
from trl import PPOTrainer


def waits_for(feature: str) -> pytest.MarkDecorator:
    """Marks what fails for now; strict, so that the mark goes when the feature comes."""
    return pytest.mark.xfail(strict=True, reason=f"issue: {feature}")


@pytest.fixture(autouse=True)
def lenient() -> Iterator[None]:
    """A client's own warnings, and ours about its habits, do not stop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name",
    [
        "sentiment_0_4",
        pytest.param("sentiment_0_7", marks=waits_for("PPOConfig of 0.5-0.11; generate_ref_response")),
        pytest.param(
            "parser_0_11", marks=waits_for("ModelConfig, get_peft_config, is_npu_available, PPOConfig of 0.11")
        ),
        "detoxify_summaries",
        "agent",
        "multi_adapter",
        pytest.param("framework_subclass", marks=waits_for("the hooks of 0.5-0.11 in a subclass")),
    ],
)
def test_client_runs(name: str) -> None:
    if name in ("parser_0_11", "detoxify_summaries", "multi_adapter"):
        pytest.importorskip("peft")
    importlib.import_module(f"tests.clients.{name}").main()


HOOKS = {
    "compute_advantages": framework.MonteCarlo,
    "_kl_penalty": framework.SteeperPenalty,
    "compute_rewards": framework.RewardOnEveryToken,
    "loss": framework.ReversedLoss,
    "train_minibatch": framework.ValueOnly,
    "_early_stop": framework.OneEpoch,
    "_step_safety_checker": framework.NegatedScores,
    "batched_forward_pass": framework.NoValues,
}
WAITING = tuple(HOOKS)


@pytest.mark.parametrize(
    "hook",
    [pytest.param(hook, marks=waits_for(f"{hook} as 0.5-0.11 had it")) if hook in WAITING else hook for hook in HOOKS],
)
def test_override_changes_what_is_learnt(hook: str) -> None:
    settings = {"early_stopping": hook == "_early_stop", "target_kl": 1e6}
    assert same(framework.learnt(PPOTrainer, **settings), framework.learnt(PPOTrainer, **settings))
    assert not same(framework.learnt(HOOKS[hook], **settings), framework.learnt(PPOTrainer, **settings))


@waits_for("_generate_batched as 0.7-0.11 had it")
def test_override_of_batched_generation_is_called() -> None:
    responses = framework.make(framework.Parrot).generate(framework.QUERIES, max_new_tokens=3)
    assert [r.tolist() for r in responses] == [q.flip(0).tolist() for q in framework.QUERIES]


def test_helpers_of_a_subclass_are_its_own() -> None:
    trainer = framework.make(framework.WithHelpers)
    assert len(trainer.generate(framework.QUERIES, max_new_tokens=3, num_beams=2)) == 4
    assert "ppo/loss/total" in trainer.step(framework.QUERIES, framework.RESPONSES, framework.SCORES)


class Called(Exception):
    """Raised by an override."""


@waits_for("an override that is never called is an error")
@pytest.mark.parametrize(
    "name", ["_prepare_deepspeed", "_remove_unused_columns", "_save_pretrained", "_set_signature_columns_if_needed"]
)
def test_override_is_called_or_refused(tmp_path: Path, name: str) -> None:
    def hook(self: PPOTrainer, *args: object, **kwargs: object) -> None:
        raise Called(name)

    kind = type("Framework", (PPOTrainer,), {name: hook})
    dataset = Dataset.from_dict({"input_ids": [[3, 4]] * 4, "unused": [0] * 4})
    with pytest.raises((Called, TypeError, ValueError), match=name):
        framework.make(kind, dataset).save_pretrained(str(tmp_path))


@waits_for("compute_advantages as 0.5-0.11 had it")
def test_advantages_that_are_not_numbers_are_not_learnt_from_in_silence() -> None:
    class Broken(PPOTrainer):
        def compute_advantages(self, values, rewards, mask):
            return values, torch.full_like(values, torch.nan), values

    stats = framework.make(Broken).step(framework.QUERIES, framework.RESPONSES, framework.SCORES)
    assert stats["ppo/skipped_updates"] > 0
