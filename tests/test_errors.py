"""Errors that torch raises as one type."""

from __future__ import annotations

import pytest
import torch

from trl.errors import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_say_that_memory_is_used_up(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
