"""Conformance 52: rewards cannot change what they are given: not the prompts, not the columns, not the run's random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rewards import hostile
from tests.rewards.samples import sample
from tests.trainer.managed import bits, events, fresh, recorded, run, words
from trl import TrainCallback
from trl.rewards import CachedReward, ErrorBudget, Sample, Scored, as_reward
from trl.rewards.compose import score_apart
from trl.rewards.failures import ColumnError

pytestmark = pytest.mark.conformance

ROWS = [{"prompt": f"w{40 + i}", "answer": {"seen": [i]}, "level": torch.tensor([float(i)])} for i in range(4)]


def own_rows() -> list[dict[str, Any]]:
    return [
        {"prompt": r["prompt"], "answer": {"seen": [*r["answer"]["seen"]]}, "level": r["level"].clone()} for r in ROWS
    ]


def spoil(answers: Sequence[dict[str, Any]], levels: Sequence[torch.Tensor]) -> list[float]:
    """What was seen before shows in the score; what is seen now would show in the next."""
    scores = [len(answer["seen"]) + float(level) / 10 for answer, level in zip(answers, levels)]
    for answer, level in zip(answers, levels):
        answer["seen"].append("again")
        level += 1
    return scores


def by_name(prompts: list[str], completions: list[str], answer: list[Any], level: list[Any]) -> list[float]:
    prompts.reverse(), completions.clear()
    return spoil(answer, level)


def by_every_column(prompts: Any, completions: Any, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    scores = spoil(columns["answer"], columns["level"])
    completion_ids[0].clear(), columns["answer"].clear(), columns.clear()
    return scores


def by_samples(samples: list[Sample]) -> list[float]:
    scores = spoil([s.columns["answer"] for s in samples], [s.columns["level"] for s in samples])
    for one in samples:
        one.columns.clear()  # type: ignore[attr-defined]
        object.__setattr__(one, "completion", "another")
    samples.clear()
    return scores


async def by_waiting(prompts: list[str], completions: list[str], answer: list[Any], level: list[Any]) -> list[float]:
    return spoil(answer, level)


class Callable_:
    def __call__(self, prompts: list[str], completions: list[str], answer: list[Any], level: list[Any]) -> list[float]:
        return spoil(answer, level)


class Made:
    """A reward of a user's own: `score` and `close`."""

    def score(self, samples: Sequence[Sample]) -> Scored:
        scores = by_samples(list(samples))
        none: list[Any] = [None] * len(scores)
        seconds = [0.0] * len(scores)
        return Scored(
            scores=[*scores], components={"made": [*scores]}, token_rewards=none, seconds=seconds, errors=none
        )

    def close(self) -> None:
        """Nothing to end."""


KINDS: dict[str, Callable[[], Any]] = {
    "by name": lambda: by_name,
    "every column": lambda: by_every_column,
    "samples": lambda: by_samples,
    "asynchronous": lambda: by_waiting,
    "an object": Callable_,
    "a reward of one's own": Made,
    "in a thread": lambda: as_reward(by_name, isolation="thread", timeout=30),
    "two at a time": lambda: as_reward(by_name, concurrency=2),
    "one sample a call": lambda: as_reward(by_name, rows_per_call=1),
    "with a budget": lambda: as_reward(Made(), budget=ErrorBudget()),
    "cached": lambda: as_reward(CachedReward(Made(), columns=()), budget=ErrorBudget()),
    "mixed": lambda: {"first": by_samples, "second": by_name, "third": Made(), "fourth": as_reward([Made(), by_name])},
}


@pytest.mark.parametrize("kind", KINDS)
def test_52_a_reward_that_writes_into_its_columns_leaves_the_samples_as_they_are(kind: str) -> None:
    rows = own_rows()
    samples = [sample(f"a b {i}", answer=row["answer"], level=row["level"]) for i, row in enumerate(rows)]
    reward = as_reward(KINDS[kind]())
    parts = 5 if kind == "mixed" else 1
    for _ in range(3):
        assert score_apart(reward, samples).scores == pytest.approx([parts * (1 + i / 10) for i in range(4)])
    assert [(s.completion, s.columns["answer"], s.columns["level"].item()) for s in samples] == [
        (f"a b {i}", {"seen": [i]}, float(i)) for i in range(4)
    ]


@pytest.mark.parametrize("reward", [by_every_column, Made()], ids=["function", "reward"])
def test_52_a_run_and_its_evaluations_see_the_same_columns_in_every_epoch(reward: Any, tmp_path: Path) -> None:
    rows, held_out = own_rows(), own_rows()
    run(prompts=rows, reward=reward, steps=3, run_dir=tmp_path, eval_prompts=held_out, eval_every=1)
    seen = [row[name] for row in recorded(tmp_path)[0] for name in ("score/mean", "eval/score_mean")]
    assert seen == pytest.approx([1.15] * 6)
    assert str(rows) == str(held_out) == str(ROWS)


def test_52_what_cannot_be_copied_is_named() -> None:
    import threading

    with pytest.raises(ColumnError, match=r"the column 'answer' holds a lock that cannot be copied.*__deepcopy__"):
        as_reward(by_name, on_error="skip").score([sample("a", answer=threading.Lock(), level=0)])
    assert as_reward(words).score([sample("a", answer=threading.Lock())]).errors == [None]  # it does not ask for it


# Random numbers ------------------------------------------------------------------------------------------------------


def noise() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


class Noisy:
    """Scores that are random numbers, of which it keeps what it drew; or that seed every generator, too."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.drawn: list[list[float]] = []

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        if self.seed is not None:
            for kind in (random.seed, np.random.seed, torch.manual_seed):
                kind(self.seed)
        self.drawn.append(noise())
        return words(prompts, completions)


class NoisyCallback(TrainCallback):
    """Draws, and seeds, wherever it is called."""

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def on_start(self, trainer: Any, step: int) -> None:
        noise(), torch.manual_seed(0)

    def on_step(self, trainer: Any, step: int, row: Any) -> bool | None:
        noise(), torch.manual_seed(0)
        row.clear()
        return step == self.last

    def on_save(self, trainer: Any, step: int, path: Path) -> None:
        noise(), torch.manual_seed(0)


def ended(folder: Path, *parts: dict[str, Any], **arguments: Any) -> tuple[Any, Any]:
    """Records and bits of a run of four steps, made in `parts`."""
    for part in parts or ({},):
        trainer = fresh()
        held_out = {"eval_prompts": ["w50", "w51 w52"], "eval_every": 2}
        run(trainer, run_dir=folder, resume="auto", steps=4, save_every=1, **held_out, **arguments, **part)
        torch.manual_seed(1234)  # of another process
    return recorded(folder), bits(trainer)


@pytest.mark.parametrize("seed", [None, 0])
def test_52_sampling_does_not_depend_on_what_a_reward_draws_or_seeds(tmp_path: Path, seed: int | None) -> None:
    quiet = ended(tmp_path / "quiet", reward=words)
    reward = Noisy(seed)
    noisy = ended(tmp_path / "noisy", reward=reward)
    completions, same = ([[s["completion"] for s in some] for some in samples] for (_, samples), _ in (noisy, quiet))
    assert completions == same
    assert noisy[1] == quiet[1]
    assert len({str(some) for some in completions}) == 4  # each step samples anew
    assert len(reward.drawn) == 4 + 3
    assert seed == 0 or len({number for numbers in reward.drawn for number in numbers}) == 3 * 5  # evaluations alike


def test_52_a_reward_that_draws_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole, parts = Noisy(), Noisy()
    first = ended(tmp_path / "whole", reward=whole)
    second = ended(
        tmp_path / "parts", {"callbacks": [NoisyCallback(2)]}, {"callbacks": [NoisyCallback()]}, reward=parts
    )
    assert whole.drawn == parts.drawn
    assert first == second


def test_52_callbacks_neither_take_the_runs_numbers_nor_change_its_rows(tmp_path: Path) -> None:
    quiet = ended(tmp_path / "quiet")
    assert ended(tmp_path / "noisy", callbacks=[NoisyCallback()]) == quiet
    assert not [line for line in events(tmp_path / "noisy") if "failed" in line]


@pytest.mark.parametrize("settings", [{}, {"rows_per_call": 2, "concurrency": 2}], ids=["one call", "two at a time"])
def test_52_a_reward_in_a_process_draws_what_follows_from_the_runs_seed(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    found = []
    for name, parts in (("whole", [{}]), ("parts", [{"callbacks": [NoisyCallback(2)]}, {}])):
        rewards = [as_reward(hostile.draws, isolation="process", **settings) for _ in parts]
        found.append(ended(tmp_path / name, *({**part, "reward": reward} for part, reward in zip(parts, rewards))))
    assert found[0] == found[1]
    scores = [sample["score"] for some in found[0][0][1] for sample in some]
    assert len(set(scores)) == len(scores) == 16


def test_52_outside_of_a_run_a_process_draws_anew() -> None:
    reward = as_reward(hostile.draws, isolation="process")
    try:
        assert reward.score([sample("a")]).scores != reward.score([sample("a")]).scores
    finally:
        reward.close()
