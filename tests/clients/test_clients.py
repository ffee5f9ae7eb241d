"""Scripts that use the interface as clients of TRL 0.4 to 0.11 do, each run from end to end."""

from __future__ import annotations

import importlib
import json
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
    # In the signatures of 0.4 to 0.6.
    "compute_rewards of 0.4": framework.RewardOnEveryTokenOf04,
    "loss of 0.4": framework.ReversedLossOf04,
    "train_minibatch of 0.4": framework.NoRewardOf04,
    "_step_safety_checker of 0.4": framework.NegatedScoresOf04,
    "batched_forward_pass of 0.4": framework.NoValuesOf04,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_override_changes_what_is_learnt(hook: str) -> None:
    settings = {"early_stopping": hook == "_early_stop", "target_kl": 1e6}
    assert same(framework.learnt(PPOTrainer, **settings), framework.learnt(PPOTrainer, **settings))
    assert not same(framework.learnt(HOOKS[hook], **settings), framework.learnt(PPOTrainer, **settings))


def test_override_of_batched_generation_is_called() -> None:
    for kind in (framework.Parrot, framework.ParrotOf05):
        responses = framework.make(kind).generate(framework.QUERIES, max_new_tokens=3)
        assert [r.tolist() for r in responses] == [q.flip(0).tolist() for q in framework.QUERIES]


def test_batched_generation_is_called_directly_with_or_without_a_model() -> None:
    trainer, greedy = framework.make(PPOTrainer), {"do_sample": False}
    newer = trainer._generate_batched(trainer.model, framework.QUERIES, lambda: 3, 2, False, **greedy)
    older = trainer._generate_batched(framework.QUERIES, lambda: 3, 2, False, **greedy)
    named = trainer._generate_batched(
        query_tensors=framework.QUERIES, length_sampler=lambda: 3, return_prompt=False, **greedy
    )
    assert [r.tolist() for r in newer] == [r.tolist() for r in older] == [r.tolist() for r in named]
    assert [len(r) for r in newer] == [3] * 4


def stats_of_a_step(trainer: PPOTrainer) -> dict[str, object]:
    torch.manual_seed(1)
    return trainer.step(framework.QUERIES, framework.RESPONSES, framework.SCORES)


RELEASES = [
    json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "compat/data/releases").glob("*.json")
]


def test_a_subclass_may_define_every_public_name_that_trl_had_not(tmp_path: Path) -> None:
    """Frameworks call methods `train`, `evaluate`, `prepare`, `state_dict` ... of their own: none of ours is called in a step."""
    methods = [path.split(".")[-2:] for release in RELEASES for path in release["signatures"]]
    theirs = {name for owner, name in methods if owner in ("PPOTrainer", "BaseTrainer")}
    theirs |= {name for release in RELEASES for name in release["attributes"]["PPOTrainer"]}
    theirs |= {"save_pretrained", "push_to_hub"}  # of huggingface_hub's mixin
    ours = {name for name in dir(PPOTrainer) if not name.startswith("_")} - theirs

    def refuse(self: PPOTrainer, *args: object, **kwargs: object) -> None:
        raise AssertionError("called by the library")

    kind = type("Framework", (PPOTrainer,), dict.fromkeys(ours, refuse))
    assert {"train", "evaluate", "prepare", "learn", "state_dict"} <= ours
    torch.manual_seed(0)
    trainer = framework.make(kind, Dataset.from_dict({"input_ids": [[3, 4]] * 4}))
    assert len(trainer.generate(framework.QUERIES, max_new_tokens=3)) == 4
    assert trainer.generate(framework.QUERIES[0], max_new_tokens=3).shape == (1, 6)
    stats = stats_of_a_step(trainer)
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, framework.SCORES)
    trainer.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    assert stats["ppo/loss/total"] == stats_of_a_step(framework.make(PPOTrainer))["ppo/loss/total"]


# What subclasses of PPOTrainer in public define: LLaMA-Factory (0.8.6 to 0.9.6), course notebooks, agents.
CLIENT_METHODS = """ppo_train create_optimizer create_scheduler get_inputs get_rewards save_model get_batch train_epoch
    compute_loss _compute_loss _collate _optimize _settings _log _forward _update _sample _step _batch _train _save
    _tokenize _prepare _get_rewards _register_scaler _encode _evaluate run rollout score collate log prompts reward
    generate_responses get_reward update sample batch"""
CLIENT_ATTRIBUTES = """args model_args finetuning_args generating_args reward_model generation_config state control callback_handler
    is_deepspeed_enabled is_fsdp_enabled amp_context processor processing_class epoch device logger rewards seed name path
    reference policy critic algorithm recipe batch_size num_epochs reward_fn word_budget api teacher_model child_model
    compute_dtype log_callback save_callback reward_running reward_mean history stats metrics step_count guards compute"""


def test_names_that_clients_define_are_their_own(tmp_path: Path) -> None:
    def refuse(self: PPOTrainer, *args: object, **kwargs: object) -> None:
        raise AssertionError("called by the library")

    class Client(PPOTrainer):
        def __init__(self, *args: object, **kwargs: object) -> None:
            vars(self).update(dict.fromkeys(CLIENT_ATTRIBUTES.split(), "the client's"))
            super().__init__(*args, **kwargs)

    kind = type("Framework", (Client,), dict.fromkeys(CLIENT_METHODS.split(), refuse))
    torch.manual_seed(0)
    trainer = framework.make(kind)
    trainer.generate(framework.QUERIES, max_new_tokens=3)
    stats = stats_of_a_step(trainer)
    trainer.save_pretrained(str(tmp_path))
    assert {vars(trainer)[name] for name in CLIENT_ATTRIBUTES.split()} == {"the client's"}
    torch.manual_seed(0)
    assert stats["ppo/loss/total"] == stats_of_a_step(framework.make(PPOTrainer))["ppo/loss/total"]


def test_private_names_are_marked_as_this_library_s_own() -> None:
    """A name that a client would choose is none of them: they begin with _trl, or are hooks that TRL had."""
    hooks = {
        *(hook for hook in HOOKS if " " not in hook),
        "_generate_batched",
        "_remove_unused_columns",
        "_save_pretrained",
    }
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
