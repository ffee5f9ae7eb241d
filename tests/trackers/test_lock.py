from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trl.trackers import RunDirectory, RunLocked
from trl.trackers.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from trl.trackers.lock import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_writer(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run") as run:
        with pytest.raises(
            RunLocked, match=rf"run is being written by process {os.getpid()} on .*; only one process may write a run"
        ):
            RunDirectory.open(tmp_path / "run")
        run.event("still mine")
    RunDirectory.open(tmp_path / "run").close()


def test_of_a_run_that_was_forgotten(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    del run
    RunDirectory.open(tmp_path / "run").close()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run").close()
    path = tmp_path / "run" / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=f"process {process.pid} on"):
            RunDirectory.open(tmp_path / "run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    RunDirectory.open(tmp_path / "run").close()
    events = (tmp_path / "run/events.log").read_text(encoding="utf-8")
    assert f"run opened; process {process.pid} on" in events and "ended without closing it" in events
    RunDirectory.open(tmp_path / "run").close()
    assert (tmp_path / "run/events.log").read_text(encoding="utf-8").count("ended without closing") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / ".lock")
    until_done, done = os.pipe()
    until_started, started = os.pipe()
    child = os.fork()
    if not child:
        os.write(started, b"x")
        os.close(done)
        os.read(until_done, 1)  # until the parent closes its end
        os._exit(0)
    try:
        os.read(until_started, 1)
        os.close(lock._descriptor or -1)  # as if the parent had been killed: nothing is unlocked
        lock._descriptor = None
        RunLock(tmp_path / ".lock").release()
    finally:
        for descriptor in (done, until_done, started, until_started):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path / ".lock").release()
    assert f"cannot lock {tmp_path / '.lock'} ([Errno 38] Function not implemented)" in caplog.text
