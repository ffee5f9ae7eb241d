"""A damaged checkpoint is named, and the run goes on from the one before, to the same end."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import KILLED, Server, differences
from tests.faults.job import BATCH
from tests.faults.orders import FULL, LORA, SEQ2SEQ, Undisturbed, at, checkpoints

FILES = ("policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    position, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def damaged(server: Server, folder: Path, job: dict[str, Any], name: str, how: Callable[..., bytes], seed: int) -> str:
    """Kills the run in its fifth step, damages a file of the newest checkpoint, goes on, and returns the log."""
    ended = server.run(folder, {**job, "orders": [at("scoring", 4 * BATCH + 2)]})
    assert ended.status == KILLED
    assert checkpoints(folder) == ["step-00000002", "step-00000004"]
    file = folder / "run" / "checkpoints" / "step-00000004" / name
    file.write_bytes(how(file.read_bytes(), random.Random(seed)))
    return f"{file.parent.name}/{name}"


@pytest.mark.parametrize(("name", "how"), [("policy.safetensors", flipped)])
def test_the_checkpoint_before_a_damaged_one_is_used(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, name: str, how: Callable[..., bytes]
) -> None:
    what = damaged(server, tmp_path, FULL, name, how, 0)
    ended = server.run(tmp_path, FULL)
    assert what in ended.log and "using step-00000002 instead" in ended.log
    assert not differences(ended.report, undisturbed(FULL))


@pytest.mark.slow
@pytest.mark.parametrize("how", [truncated, flipped])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("job", [FULL, LORA, SEQ2SEQ], ids=lambda job: job["case"])
def test_every_file_of_a_checkpoint_is_checked(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, job: dict[str, Any], name: str, how: Callable[..., bytes]
) -> None:
    for seed in range(3):
        folder = tmp_path / str(seed)
        what = damaged(server, folder, job, name, how, seed)
        ended = server.run(folder, job)
        assert what in ended.log and "using step-00000002 instead" in ended.log, ended.log[-2000:]
        assert not differences(ended.report, undisturbed(job))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(server: Server, tmp_path: Path) -> None:
    damaged(server, tmp_path, FULL, "state.json", truncated, 0)
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "policy.safetensors").unlink()
    ended = server.run(tmp_path, FULL)
    assert ended.status == 1
    assert "CheckpointError: no checkpoint in" in ended.log
    assert "step-00000002/policy.safetensors is missing" in ended.log
