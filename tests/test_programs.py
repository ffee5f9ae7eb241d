from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from tests.programs import run_program


def test_a_deadline_ends_a_launcher_and_what_it_started_and_shows_their_stacks(tmp_path: Path) -> None:
    """The grandchild has a session of its own and holds the output, as the ranks of torchrun do."""
    rank = tmp_path / "rank.py"
    rank.write_text(
        f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, {str(rank)!r}], start_new_session=True)"
    with pytest.raises(AssertionError, match=r"did not end within 2 s[\s\S]*rank.py"):
        run_program([sys.executable, "-c", launcher], cwd=tmp_path, env=dict(os.environ), timeout=2)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_of_a_program_that_ends(tmp_path: Path) -> None:
    done = run_program(
        [sys.executable, "-c", "import sys; print('said'); sys.exit('and failed')"], cwd=tmp_path, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "said\n", "and failed\n")
