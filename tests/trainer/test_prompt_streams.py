"""Prompts from streams in a managed run: what a resumed run compares, and what processes must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def stream(last: int = 11) -> Iterator[dict[str, Any]]:
    for number in range(5, last):
        yield {"prompt": f"w{number} w{number + 1}", "number": number}


def train(make_trainer: Any, prompts: Any, steps: int, run_dir: Path | None = None) -> tuple[Any, list[Any]]:
    seen: list[Any] = []

    def reward(prompts: list[str], completions: list[str], number: list[int], **columns: Any) -> list[float]:
        seen.extend(number)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(batch_size=4, mini_batch_size=4)
    options = {"reward": reward, "generation": {"max_new_tokens": 3}, "progress": False, "resume": "auto"}
    return trainer.train(prompts, steps=steps, run_dir=run_dir, **options), seen


def test_a_run_on_a_stream_is_that_on_its_list_and_goes_on_where_it_was(make_trainer: Any, tmp_path: Path) -> None:
    whole, seen = train(make_trainer, list(stream()), 4)
    train(make_trainer, stream(), 2, tmp_path / "run")
    resumed, seen_after = train(make_trainer, stream(), 4, tmp_path / "run")
    assert resumed.metrics["score/mean"] == whole.metrics["score/mean"]
    assert seen_after == seen[8:]


def test_another_stream_is_refused_when_a_run_is_resumed(make_trainer: Any, tmp_path: Path) -> None:
    half_read = stream()
    next(half_read)
    train(make_trainer, stream(), 1, tmp_path / "run")
    for other in (half_read, stream(12), reversed(list(stream()))):
        with pytest.raises(ValueError, match="its prompts have other ids or tokens"):
            train(make_trainer, other, 2, tmp_path / "run")


def test_processes_with_different_prompts_are_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `split_dataset_by_node`: this process has one part, the other another one."""
    monkeypatch.setattr("trl.runs.inputs.share_bytes", lambda accelerator, data: [data, b"another digest"])
    with pytest.raises(ValueError, match="the prompts differ between processes"):
        train(make_trainer, stream(), 1)


def another_process_says(old: bytes, new: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    both = lambda accelerator, data: [data, data.replace(old, new)]  # noqa: E731
    monkeypatch.setattr("trl.training.processes.share_bytes", both)


def test_processes_that_would_take_prompts_in_different_orders_are_refused(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(batch_size=2, mini_batch_size=1)
    another_process_says(b'"seed": 0', b'"seed": 1', monkeypatch)
    with pytest.raises(ValueError, match="the same on every process: seed is 0 on process 0 and 1 on process 1"):
        train(lambda **settings: trainer, stream(), 1)


@pytest.mark.parametrize(("name", "own", "other"), [("learning_rate", 1e-3, 1e-2), ("batch_size", 4, 5)])
def test_processes_with_different_settings_are_refused(
    name: str, own: Any, other: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_process_says(f'"{name}": {own}'.encode(), f'"{name}": {other}'.encode(), monkeypatch)
    with pytest.raises(ValueError, match=f"{name} is {own} on process 0 and {other} on process 1"):
        make_trainer(**{"batch_size": 4, "mini_batch_size": 1, name: own})
    another_process_says(b'"seed": 0', b'"seed": 1', monkeypatch)
    make_trainer()  # a loop of one's own may seed each process by itself
