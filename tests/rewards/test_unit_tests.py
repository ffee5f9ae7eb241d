"""S4: code that a model wrote runs in a sandbox, or where the user has said in so many words that it may."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.samples import sample
from tests.rewards.test_hostile import alive
from trl.rewards import UnitTestReward, as_reward
from trl.rewards.failures import ColumnError
from trl.rewards.unit_tests import code_of

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]

posix = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX")


def local(**settings: Any) -> Any:
    with pytest.warns(UserWarning, match="runs code written by a model on this machine"):
        return as_reward(UnitTestReward(unsafe_local=True, **settings), on_error="skip")


def run(code: str, tests: Any = TESTS, **settings: Any) -> float | None:
    scored = local(**settings).score([sample(f"Here:\n```python\n{code}\n```\nDone.", tests=tests)])
    assert scored.errors == [None]
    return scored.scores[0]


def test_refused_without_a_sandbox() -> None:
    with pytest.raises(ValueError, match="pass either sandbox=, or unsafe_local=True"):
        UnitTestReward()
    with pytest.raises(ValueError, match=r"got sandbox=.*Recorder.* and unsafe_local=True"):
        UnitTestReward(Recorder(""), unsafe_local=True)


@posix
def test_allowed_loudly(caplog: pytest.LogCaptureFixture) -> None:
    local()
    assert "runs code written by a model on this machine, with access to your files and network" in caplog.text


class Recorder:
    """A sandbox that runs nothing."""

    def __init__(self, output: str | None) -> None:
        self.output = output
        self.asked: list[tuple[str, str, float]] = []

    def run(self, program: str, text: str, *, seconds: float) -> str | None:
        self.asked.append((program, text, seconds))
        if self.output == "ill":
            raise OSError("no sandbox today")
        return self.output


@pytest.mark.parametrize("output", [None, "", "3", "passed 3\n", "0123456789abcdef0123456789abcdef 3\n"])
def test_a_sandbox_gets_the_code_and_a_result_cannot_be_made_up(output: Any) -> None:
    sandbox = Recorder(output)
    scored = as_reward(UnitTestReward(sandbox, seconds=3)).score([sample(ADD, tests=TESTS)])
    assert scored.scores == [0.0]
    ((program, text, seconds),) = sandbox.asked
    assert "add" not in program and "return a + b" in text and seconds == 3


def test_a_sandbox_that_fails_is_an_error() -> None:
    scored = as_reward(UnitTestReward(Recorder("ill")), on_error="skip").score([sample(ADD, tests=TESTS)])
    assert scored.scores == [None] and scored.errors == ["OSError: no sandbox today"]


@posix
def test_share_of_tests() -> None:
    assert run(ADD) == pytest.approx(2 / 3)
    assert run(ADD, TESTS[0]) == 1.0
    assert run(ADD, all_or_nothing=True) == 0.0
    assert run(ADD, TESTS[:2], all_or_nothing=True) == 1.0


@pytest.mark.parametrize("tests", [None, [], ""])
def test_no_tests_unscorable(tests: Any) -> None:
    assert as_reward(UnitTestReward(Recorder(""))).score([sample(ADD, tests=tests)]).scores == [None]


def test_tests_that_are_none() -> None:
    with pytest.raises(ColumnError, match="needs the column 'tests', which sample 0 lacks"):
        as_reward(UnitTestReward(Recorder(""))).score([sample(ADD)])
    with pytest.raises(ColumnError, match="a test is of type int"):
        as_reward(UnitTestReward(Recorder(""))).score([sample(ADD, tests=[1])])


@posix
@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "def add(a, b):",
        "print('0 3'); raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 9)",
        "open('/proc/self/fd/1', 'w').write('3')\nimport os; os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
    ],
)
def test_ending_the_process_passes_nothing(code: str) -> None:
    assert run(code) == 0.0


@posix
def test_a_hang_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    path = tmp_path / "pid"
    code = (
        f"import os\nopen({str(path)!r}, 'w').write(str(os.getpid()))\ntry:\n    os.fork()\nexcept OSError:\n    pass\n"
    )
    assert run(code + "import time\ntime.sleep(1000)", seconds=0.5) == 0.0
    assert time.monotonic() - started < 1.5
    assert not alive(int(path.read_text()))


@posix
def test_limits() -> None:
    assert run("x = bytearray(1 << 31)", ["pass"]) == 0.0  # memory
    assert run("", ["open('f', 'wb').write(b'x' * (1 << 25))"]) == 0.0  # a file: killed for its size
    assert run(ADD + "print('x' * (1 << 24))\n", TESTS[0]) == 1.0  # printing is read and thrown away
    secret = "import os\nassert 'HOME' in os.environ and 'CANARY' not in os.environ\nassert os.listdir('.') == []"
    os.environ["CANARY"] = "x"
    try:
        assert run("", secret) == 1.0
    finally:
        del os.environ["CANARY"]


@posix
def test_order_with_several_at_a_time() -> None:
    batch = [sample(f"x = {i}", tests=["assert x >= 1", "assert x >= 2"]) for i in range(3)]
    assert local(concurrency=2).score(batch).scores == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("first\n```py\nx = 1\n```\nbetter\n```\nx = 2\n```", "x = 2\n"),
    ],
)
def test_code_in_completions(text: str, code: str) -> None:
    assert code_of(text) == code


@pytest.mark.parametrize("settings", [{"seconds": 0}, {"memory": 0}, {"concurrency": 0}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        UnitTestReward(Recorder(""), **settings)
