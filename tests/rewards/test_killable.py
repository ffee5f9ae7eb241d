"""`Killable`: how processes end, what is kept of their output, and that nothing of theirs is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import pytest

from tests.rewards.test_hostile import alive
from trl.rewards.killable import Killable

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


def start(code: str) -> Killable:
    return Killable([sys.executable, "-S", "-c", code], environment={})


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("", "exited with status 0"),
        ("import sys; sys.exit(3)", "exited with status 3"),
        ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
        ("import os; os.kill(os.getpid(), 50)", "was killed by signal 50"),  # a real-time signal without a name
    ],
)
def test_an_ending_is_told_by_status_or_signal(code: str, ending: str) -> None:
    process = start(code)
    wait_for(process.has_ended)
    assert process.kill() == ending
    assert process.kill() == ending and process.has_ended() and process.read_output() is False  # it stays so


def test_a_running_process_is_killed_with_a_child_that_left_its_group() -> None:
    if not os.path.exists("/proc/self/environ"):
        pytest.skip("without /proc a child that left the group is not found")
    code = "import os, time; pid = os.fork(); pid or os.setsid(); pid and print(pid, flush=True); time.sleep(1000)"
    process = start(code)
    wait_for(lambda: process.read_output() and process.tail)
    child = int(process.tail)
    assert not process.has_ended() and alive(child)
    time.sleep(0.1)  # time for the child to leave the group
    assert process.kill() == "was killed by SIGKILL"
    wait_for(lambda: not alive(child))
    assert not alive(process.pid)


def test_only_the_end_of_the_output_is_kept() -> None:
    process = start("import sys; print('x' * 100_000 + 'end', flush=True); print('error', file=sys.stderr)")
    wait_for(lambda: not process.read_output() and process.has_ended())
    process.kill()
    assert process.tail.endswith("xend\nerror") and len(process.tail) <= 16_384


def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        Killable(["/no/such/program"], environment={})
