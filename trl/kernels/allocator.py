"""What the C library does with the memory that a step lets go of."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


@cache
def keep_freed_memory() -> bool:
    """Has glibc keep freed memory for the next allocation, in this process from now on.

    As it is, glibc asks the kernel for every large block and gives it back when it is freed. A training step allocates the
    same hundreds of megabytes again and again, and the kernel hands them out page by page, each of them cleared: on a CPU
    that is a large part of the time of an update. Resident memory then stays at its peak.

    Returns:
        Whether it was done: glibc alone has these settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    done = bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    if done:
        logger.info("freed memory is kept for the next step (PPOConfig.keep_memory)")
    return done
