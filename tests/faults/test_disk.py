"""A disk without room costs a run a save, or ends it in order; what was saved before is still there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import ROOT, Server, differences
from tests.faults.job import STEPS
from tests.faults.orders import FULL, LORA, Undisturbed, at, checkpoints, full_disk


def stops_and_goes_on(
    server: Server,
    folder: Path,
    job: dict[str, Any],
    wanted: dict[str, Any],
    order: dict[str, Any],
    *also: dict[str, Any],
) -> None:
    """Ends with an error that says why, and once there is room, goes on to the same end."""
    ended = server.run(folder, {**job, "train": {"on_disk_error": "stop"}, "orders": [order, *also]})
    assert ended.status == 1, f"{order}: {ended.statuses}\n{ended.log[-3000:]}"
    assert "No space left on device" in ended.log
    left = [path.name for path in (folder / "run" / "checkpoints").glob("*") if path.name.startswith(".staging")]
    assert not left  # what was half-written takes no room
    ended = server.run(folder, job)
    assert ended.status == 0, f"{order}: {ended.log[-3000:]}"
    assert not differences(ended.report, wanted), order


@pytest.mark.parametrize(
    "order", [full_disk("save", 40), full_disk("record", 5), full_disk("append", 6)], ids=lambda order: order["place"]
)
def test_a_full_disk_ends_the_run_in_order(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, order: dict[str, Any]
) -> None:
    unreached = at("after step", STEPS * 4)  # a run that went on for long would be killed instead
    stops_and_goes_on(server, tmp_path, LORA, undisturbed(LORA), order, unreached)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["save", "record", "append"])
def test_a_disk_that_is_full_from_any_write_on(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, figures: list[str], place: str
) -> None:
    wanted = undisturbed(LORA)
    writes = wanted["counts"][f"writes/{place}"]
    for n in range(1, writes + 1):
        stops_and_goes_on(server, tmp_path / str(n), LORA, wanted, full_disk(place, n))
    figures.append(f"disk full from write n on, for each n of {writes} ({place}): stopped, and bit-equal after")


def test_a_run_goes_on_without_a_save(server: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    wanted = undisturbed(LORA)
    one = wanted["counts"]["writes/save"] // 3
    job = {**LORA, "train": {"on_disk_error": "go_on"}}
    # The disk has room again after the save of step 4, and the run is killed in the step after.
    orders = [full_disk("save", one + 5, one + 5), at("scoring", 18)]
    ended = server.run(tmp_path, {**job, "orders": orders})
    assert ended.status == -9
    assert "No space left on device" in ended.log
    assert checkpoints(tmp_path) == ["step-00000002"]
    ended = server.run(tmp_path, job)
    assert ended.status == 0, ended.log[-3000:]
    assert not differences(ended.report, wanted)


def but_for_errors(lines: list[str]) -> list[str]:
    """Differences between runs, without how often the disk refused."""
    return [line for line in lines if "/summary/run/disk_errors " not in line]


def test_records_wait_for_the_disk(server: Server, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Rows, events and samples are written once there is room, whole and in order."""
    orders = [full_disk("append", 4, 4), full_disk("append", 6, 8), full_disk("record", 6, 7)]
    ended = server.run(tmp_path, {**LORA, "train": {"on_disk_error": "go_on"}, "orders": orders})
    assert ended.status == 0, ended.log[-3000:]
    assert ended.report["summary"]["run/disk_errors"] >= 3
    assert not but_for_errors(differences(ended.report, undisturbed(LORA)))


@pytest.mark.slow
def test_any_write_of_a_save_may_fail_and_the_run_ends_the_same(
    server: Server, undisturbed: Undisturbed, tmp_path: Path, figures: list[str]
) -> None:
    wanted = undisturbed(LORA)
    writes = wanted["counts"]["writes/save"]
    for n in range(1, writes + 1):
        job = {**LORA, "train": {"on_disk_error": "go_on"}, "orders": [full_disk("save", n, n)]}
        ended = server.run(tmp_path / str(n), job)
        assert ended.status == 0, f"write {n}: {ended.log[-3000:]}"
        assert not but_for_errors(differences(ended.report, wanted)), n
        left = checkpoints(tmp_path / str(n))
        assert left[-1].startswith("step-00000006") and len(left) in (2, 3)  # the best one of them may be older
    figures.append(f"write n of a save fails, for each n of {writes}: went on, bit-equal")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs Linux' unshare")
def test_a_small_disk_that_fills_up(undisturbed: Undisturbed, tmp_path: Path, figures: list[str]) -> None:
    """A file system in memory, of a few pages; enlarged when the run has stopped."""
    probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True)
    if probe.returncode != 0:
        pytest.skip(f"no file system can be mounted: {probe.stderr.decode().strip()}")
    wanted, stopped, sizes = undisturbed(FULL), 0, range(40, 440, 80)
    for size in sizes:
        folder = tmp_path / str(size)
        disk, report, job = folder / "disk", folder / "report.json", folder / "job.json"
        disk.mkdir(parents=True)
        job.write_text(json.dumps({**FULL, "run_dir": str(disk / "run"), "report": str(report)}))
        program = f"{sys.executable} -m tests.faults.job {job}"
        script = (
            f"mount -t tmpfs -o size={size}k none {disk}\n"
            f"{program} 2>{folder}/first.txt; echo $? >{folder}/status\n"
            f"mount -o remount,size=64m {disk}\n{program}"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        first = (folder / "first.txt").read_text()
        if int((folder / "status").read_text()):
            stopped += 1
            assert "No space left on device" in first, first[-3000:]
        assert not differences(json.loads(report.read_text()), wanted)
    assert stopped >= 3
    figures.append(
        f"disk of {sizes[0]} to {sizes[-1]} KiB: {stopped} of {len(sizes)} filled up; all bit-equal in the end"
    )
