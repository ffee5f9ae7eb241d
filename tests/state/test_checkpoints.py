"""Checkpoints on a disk that stops, fills up, forgets or lies, and in the hands of somebody else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.disks import Disk, Stopped, use
from trl import files
from trl.state.checkpoints import (
    MANIFEST,
    POINTER,
    CheckpointError,
    DamagedCheckpoint,
    best_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from trl.state.tensorfile import safetensors_pieces, safetensors_size

ROOT = Path(__file__).parents[2]


def contents(step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and state that tell the step they are of."""
    policy = {"b": torch.arange(5.0) + step, "a": torch.tensor(step)}
    return {"policy": policy, "optimizer": {"a/step": torch.tensor(float(step))}}, {"at": step, "third": 1 / 3}


def save(folder: Path, step: int, **settings: Any) -> Path:
    return save_checkpoint(folder, step, *contents(step), **settings)


def loaded_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, after a look at everything in it."""
    found = load_checkpoint(folder)
    if found is None:
        return None
    tensors, state = contents(found.step)
    assert found.state == state
    for name, group in tensors.items():
        assert same(found.tensors(name), group)
    return found.step


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and torch.equal(a, other[k]) for k, a in one.items()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The file format -----------------------------------------------------------------------------------------------------


def test_the_stream_is_a_safetensors_file(tmp_path: Path) -> None:
    """Read by the library that defines the format: every type, odd sizes, no elements, no dimensions, strides."""
    tensors = {
        "f32": torch.randn(3, 5),
        "f64": torch.randn(2, dtype=torch.float64),
        "bf16": torch.randn(3).bfloat16(),
        "i64": torch.tensor(2**60 + 1),
        "u8": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(4, 6).t()[::2],
        "nan": torch.tensor([float("nan"), -0.0]).view(torch.int32).view(torch.float32),
    }
    size, _ = files.write_file(tmp_path / "x.safetensors", safetensors_pieces(tensors))
    assert size == safetensors_size(tensors) == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert (
            read[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes()
            if name != "bf16"
            else (torch.equal(read[name], tensor))
        )
    with pytest.raises(ValueError, match=r"safetensors cannot store torch\.complex64"):
        list(safetensors_pieces({"c": torch.zeros(1, dtype=torch.complex64)}))


# A save, and what is kept --------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_and_names_its_versions(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    path = save(tmp_path / "a" / "b", 12)
    assert path == tmp_path / "a" / "b" / "step-00000012"
    assert names(path.parent) == [POINTER, "step-00000012"]
    assert names(path) == [MANIFEST, "optimizer.safetensors", "policy.safetensors", "state.json"]
    assert json.loads((path.parent / POINTER).read_text()) == {"checkpoint": path.name, "step": 12, "best": None}
    found = load_checkpoint(path.parent)
    assert found is not None and (found.step, found.path) == (12, path)
    assert found.versions["torch"] == torch.__version__
    assert loaded_step(path.parent) == 12


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    metrics = {1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.9, 5: None, 6: 0.3}
    for step, metric in metrics.items():
        save(tmp_path, step, keep_last=2, metric=metric)
    assert names(tmp_path) == [POINTER, "step-00000002", "step-00000005", "step-00000006"]  # the first of equals
    assert json.loads((tmp_path / POINTER).read_text())["best"] == "step-00000002"
    best = best_checkpoint(tmp_path)
    assert best is not None and (best.step, best.metric) == (2, 0.9)
    save(tmp_path, 7, keep_last=1)
    assert names(tmp_path) == [POINTER, "step-00000002", "step-00000007"]


def test_a_run_that_was_taken_back_goes_on_from_there(tmp_path: Path) -> None:
    """The highest step is not the newest save: going on from it would bring back what was given up."""
    for step in (10, 20):
        save(tmp_path, step)
    again = save(tmp_path, 10)  # the disk holds a step-00000010 already
    assert loaded_step(tmp_path) == 10
    assert names(tmp_path) == [POINTER, again.name]
    save(tmp_path, 20)
    assert loaded_step(tmp_path) == 20


def test_a_run_that_was_taken_back_and_stopped_before_the_old_saves_were_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr("trl.state.checkpoints._retire", stop)
        with pytest.raises(Stopped):
            save(tmp_path, 15)
    assert {"step-00000015", "step-00000020"} < set(names(tmp_path))
    assert loaded_step(tmp_path) == 15


def stop(*args: Any) -> None:
    raise Stopped


@pytest.mark.parametrize(
    ("step", "tensors", "state", "keep", "message"),
    [
        (1, {}, {}, 0, "keep_last=0"),
        (-1, {}, {}, 1, "step=-1"),
        (1, {"../x": {}}, {}, 1, "'../x'"),
        (1, {}, {"x": float("nan")}, 1, "the state cannot be written as JSON: Out of range"),
        (1, {}, {"x": torch.zeros(1)}, 1, "the state cannot be written as JSON: Object of type Tensor"),
        (1, {"x": {"y": torch.zeros(1, dtype=torch.complex64)}}, {}, 1, "complex64"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, step: int, tensors: Any, state: Any, keep: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "c", step, tensors, state, keep_last=keep)
    assert not (tmp_path / "c").exists()


# R3: stopped anywhere ------------------------------------------------------------------------------------------------


def changes_of_a_save(folder: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> list[tuple[str, str]]:
    with monkeypatch.context() as patch:
        disk = use(patch, Disk())
        save(folder, step, keep_last=1)
    return disk.log


@pytest.mark.parametrize("power", [True, False], ids=["killed", "power lost"])
@pytest.mark.parametrize("earlier", [0, 2])
def test_stopped_after_every_single_change_the_newest_complete_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: int, power: bool
) -> None:
    """With `power lost`, what was written and not synced is lost as well."""
    start = tmp_path / "start"
    start.mkdir()
    for step in range(1, earlier + 1):
        save(start, step, keep_last=2)
    shutil.copytree(start, tmp_path / "whole")
    log = changes_of_a_save(tmp_path / "whole", monkeypatch, 3)
    placed = next(i for i, (name, path) in enumerate(log) if name == "replace" and "step-00000003" in path)
    assert {name for name, _ in log} >= {"mkdir", "write", "fsync", "replace"}
    assert len(log) >= 20
    outcomes = []
    for stop in range(len(log)):
        folder = tmp_path / f"stopped-{stop}"
        shutil.copytree(start, folder)
        with monkeypatch.context() as patch:
            disk = use(patch, Disk(stop_after=stop))
            with pytest.raises(Stopped):
                save(folder, 3, keep_last=1)
        if not power:
            disk.lose_power()
        outcomes.append(loaded_step(folder))
        with monkeypatch.context() as patch:
            use(patch, Disk())
            save(folder, 4, keep_last=1)  # and the next save goes through and leaves no rest
        assert names(folder) == [POINTER, "step-00000004"]
        shutil.rmtree(folder)
    before = earlier or None
    assert outcomes == [before] * (placed + 1) + [3] * (len(log) - placed - 1)


def test_a_process_that_ends_inside_a_save(tmp_path: Path) -> None:
    """The same with processes that are gone at once, and the disk as they leave it."""
    save(tmp_path / "start", 1)
    stops = range(0, 26, 5)
    for stop in stops:
        shutil.copytree(tmp_path / "start", tmp_path / str(stop))
    code = (
        "import os, transformers, trl.files\n"
        "from pathlib import Path\n"
        "from tests.training.disks import Disk\n"
        "from tests.state.test_checkpoints import save\n"
        f"for stop in {list(stops)}:\n"
        "    if os.fork() == 0:\n"
        "        trl.files.os = Disk(stop_after=stop, exits=True)\n"
        f"        save(Path({str(tmp_path)!r}) / str(stop), 2, keep_last=1)\n"
        "        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["9"] * len(stops)
    steps = [loaded_step(tmp_path / str(stop)) for stop in stops]
    assert set(steps) == {1, 2} and steps == sorted(steps)  # type: ignore[type-var]


# R3: damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST, "policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["truncated", "gone", "flipped", "empty", "link"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    folder = tmp_path / "c"
    for step in (1, 2):
        save(folder, step)
    file = folder / "step-00000002" / name
    data = file.read_bytes()
    if harm in ("gone", "link"):
        file.unlink()
    if harm == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        file.symlink_to(tmp_path / "elsewhere")
    elif harm == "truncated":
        file.write_bytes(data[:-1])
    elif harm == "empty":
        file.write_bytes(b"")
    if harm == "flipped":
        for place in range(0, len(data), max(1, len(data) // 23)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            caplog.clear()
            if loaded_step(folder) != 1:  # a blank between two words of the manifest says nothing
                assert name == MANIFEST and json.loads(file.read_bytes()) == json.loads(data)
                continue
            assert str(file) in caplog.text and "using step-00000001 instead" in caplog.text
        return
    with caplog.at_level(logging.WARNING):
        assert loaded_step(folder) == 1
    assert str(file) in caplog.text and "using step-00000001 instead" in caplog.text


def test_every_bit_of_a_tensor_file_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    file = path / "optimizer.safetensors"
    data = file.read_bytes()
    for place in range(len(data)):
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors has changed"):
            read_checkpoint(path)


def test_nothing_loadable_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "policy.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*step-00000002.*step-00000001"):
        load_checkpoint(tmp_path)
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step-0000000{step}")
    with pytest.raises(CheckpointError, match="they were removed"):
        load_checkpoint(tmp_path)


def test_the_pointer_is_no_single_point_of_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / POINTER).write_text("{")
    assert loaded_step(tmp_path) == 2
    assert "latest.json cannot be read" in caplog.text
    (tmp_path / POINTER).unlink()
    assert loaded_step(tmp_path) == 2
    save(tmp_path, 3)
    shutil.rmtree(tmp_path / "step-00000003")
    assert loaded_step(tmp_path) == 2
    assert "names step-00000003, which no longer exists" in caplog.text


def test_a_later_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("trl.state.checkpoints.FORMAT", 2)
        save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"step-00000002 has format 2, .* reads formats up to 1"):
        load_checkpoint(tmp_path)


# R4: no room ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_nothing_but_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    log = changes_of_a_save(tmp_path, monkeypatch, 2)
    writes = sum(name == "write" for name, _ in log)
    shutil.rmtree(tmp_path / "step-00000002")
    save(tmp_path, 1)
    for full_after in range(writes):
        with monkeypatch.context() as patch:
            use(patch, Disk(full_after=full_after))
            with pytest.raises(
                CheckpointError, match=r"step 2 \(\d+ bytes\).*No space left on device: .*bytes are free"
            ):
                save(tmp_path, 2)
        if full_after < writes - 1:
            assert names(tmp_path) == before
            assert loaded_step(tmp_path) == 1
    # The last write is the pointer's: the checkpoint itself is complete.
    assert loaded_step(tmp_path) == 2


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    use(monkeypatch, Disk(full_after=4))
    with pytest.raises(
        CheckpointError,
        match=r"optimizer\.safetensors; \d+ bytes are free there; step-00000001 remains the newest checkpoint",
    ):
        save(tmp_path, 2)


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    use(monkeypatch, Disk(read_only=True))
    with pytest.raises(CheckpointError, match=r"Read-only file system: .*step-00000001 remains the newest checkpoint"):
        save(tmp_path, 2)
    assert loaded_step(tmp_path) == 1


def test_what_cannot_be_removed_is_named_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)

    def refuse(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("trl.files.remove", refuse)
    save(tmp_path, 2, keep_last=1)
    assert loaded_step(tmp_path) == 2
    assert f"{files.STAGING}step-00000001-removed" in caplog.text and "Permission denied" in caplog.text
    save(tmp_path, 3, keep_last=1)
    assert loaded_step(tmp_path) == 3


# S1: in the hands of somebody else -----------------------------------------------------------------------------------


class Canary:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "fired")))
    assert (tmp_path / "fired").exists()


@pytest.mark.parametrize("name", [MANIFEST, "policy.safetensors", "optimizer.safetensors", "state.json", POINTER])
@pytest.mark.parametrize("signed", [True, False])
def test_no_file_of_a_checkpoint_is_unpickled(tmp_path: Path, name: str, signed: bool) -> None:
    """Even with checksums that fit, as whoever wrote the pickle would make them."""
    folder, fired = tmp_path / "c", tmp_path / "fired"
    path = save(folder, 1)
    harm = pickle.dumps(Canary(fired))
    (folder / name if name == POINTER else path / name).write_bytes(harm)
    (path / "pytorch_model.bin").write_bytes(harm)
    if signed and name not in (POINTER, MANIFEST):
        from trl.state.checkpoints import _digest

        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": len(harm), "sha256": files.sha256_of(path / name)}
        manifest.pop("sha256")
        (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
    try:
        loaded_step(folder)
    except Exception as error:
        assert name != POINTER, error
    else:
        assert name == POINTER
    assert not fired.exists()


@pytest.mark.parametrize("name", ["../../outside.json", "{absolute}"])
def test_a_manifest_names_files_beside_it_only(tmp_path: Path, name: str) -> None:
    from trl.state.checkpoints import _digest

    path = save(tmp_path / "c", 1)
    (tmp_path / "outside.json").write_text("{}")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.pop("sha256")
    name = name.format(absolute=tmp_path / "outside.json")
    assert (path / name).resolve() == (tmp_path / "outside.json").resolve()
    manifest["files"][name] = {"bytes": 2, "sha256": files.sha256_of(tmp_path / "outside.json")}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(path)


def test_a_link_is_no_checkpoint_and_is_left_alone(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 9)
    folder = tmp_path / "c"
    save(folder, 1)
    (folder / "step-00000009").symlink_to(elsewhere)
    (folder / f"{files.STAGING}link").symlink_to(elsewhere)
    assert loaded_step(folder) == 1
    save(folder, 2, keep_last=1)
    assert loaded_step(tmp_path / "elsewhere") == 9
    assert names(folder) == [POINTER, "step-00000002", "step-00000009"]
