"""Freed memory stays with a process that asked for it, and with no other."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_MEASURE = """
import sys
from trl.kernels.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
before = resident()
block = bytearray(256 << 20)
full = resident()
del block
print(kept, full - before, resident() - before)
"""


@pytest.mark.kernel
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone has these settings")
@pytest.mark.parametrize(("argument", "kept"), [("kept", "True"), ("freed", "None")])
def test_resident_memory_after_a_large_block_is_freed(argument: str, kept: str) -> None:
    command = [sys.executable, "-c", _MEASURE, argument]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    returned, full, left = ended.stdout.split()
    assert returned == kept
    assert int(full) > 250 << 20
    assert (int(left) > 250 << 20) is (argument == "kept")
