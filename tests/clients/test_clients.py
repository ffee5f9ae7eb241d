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
        "sentiment_0_7",
        "parser_0_11",
        "detoxify_summaries",
        "agent",
        "multi_adapter",
        "framework_subclass",
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


@pytest.mark.parametrize("hook", HOOKS)
def test_override_changes_what_is_learnt(hook: str) -> None:
    settings = {"early_stopping": hook == "_early_stop", "target_kl": 1e6}
    assert same(framework.learnt(PPOTrainer, **settings), framework.learnt(PPOTrainer, **settings))
    assert not same(framework.learnt(HOOKS[hook], **settings), framework.learnt(PPOTrainer, **settings))


def test_override_of_batched_generation_is_called() -> None:
    responses = framework.make(framework.Parrot).generate(framework.QUERIES, max_new_tokens=3)
    assert [r.tolist() for r in responses] == [q.flip(0).tolist() for q in framework.QUERIES]


def test_private_names_are_marked_as_this_library_s_own() -> None:
    """A name that a client would choose is none of them: they begin with _trl, or are hooks that TRL had."""
    hooks = {*HOOKS, "_generate_batched", "_remove_unused_columns", "_save_pretrained"}
    trainer = framework.make(PPOTrainer)
    trainer.step(framework.QUERIES, framework.RESPONSES, framework.SCORES)
    names = {*vars(trainer), *(name for kind in PPOTrainer.__mro__[:-1] for name in vars(kind))}
    assert {n for n in names if n.startswith("_") and not n.startswith(("__", "_trl_", "_abc"))} <= hooks


def test_helpers_of_a_subclass_are_its_own() -> None:
    trainer = framework.make(framework.WithHelpers)
    assert len(trainer.generate(framework.QUERIES, max_new_tokens=3, num_beams=2)) == 4
    assert "ppo/loss/total" in trainer.step(framework.QUERIES, framework.RESPONSES, framework.SCORES)


class Called(Exception):
    """Raised by an override."""


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


def test_advantages_that_are_not_numbers_are_not_learnt_from_in_silence() -> None:
    class Broken(PPOTrainer):
        def compute_advantages(self, values, rewards, mask):
            return values, torch.full_like(values, torch.nan), values

    stats = framework.make(Broken).step(framework.QUERIES, framework.RESPONSES, framework.SCORES)
    assert stats["ppo/skipped_updates"] > 0
