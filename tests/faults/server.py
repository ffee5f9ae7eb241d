"""Starts runs as processes of their own without the seconds that importing torch takes.

A request is a line of JSON on standard input: `{"jobs": [JOB, ...], "seconds": 60}`, a job for each process of a run. All
of them are forked from here, where the libraries are imported and no thread runs yet. When one fails, the others are killed
after a moment, as a launcher of distributed runs does. The answer is a line, too: `{"statuses": [0, -9], "late": false}`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_PATIENCE = 1.0  # seconds that the other processes of a run may take to end after one has failed


def main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    _preload()
    for line in requests:
        request = json.loads(line)
        answer = _run(request["jobs"], request["seconds"], (requests.fileno(), answers.fileno()))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _preload() -> None:
    import numpy.random  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    import torch.distributed

    import tests.faults.job  # noqa: F401
    from tests.helpers import tiny_gpt2, tiny_t5, tiny_tokenizer
    from tests.models.lora import lora

    torch.set_num_threads(1)
    lora(tiny_gpt2()), tiny_t5(), tiny_tokenizer()  # what they import on first use
    # The allocator that comes with pyarrow is prepared for a fork, and has its thread anew in the child.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if others := [name for name in threads[1:] if name != "jemalloc_bg_thd"]:
        raise RuntimeError(f"threads run ({', '.join(others)}): a fork would have their locks, and not them")


def _run(jobs: list[dict[str, Any]], seconds: float, private: tuple[int, ...]) -> dict[str, Any]:
    running = {_start(job, private): index for index, job in enumerate(jobs)}
    statuses: list[int | None] = [None] * len(jobs)
    deadline, late = time.monotonic() + seconds, False
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                statuses[running.pop(pid)] = code
                if code != 0:
                    deadline = min(deadline, time.monotonic() + _PATIENCE)
        if running and time.monotonic() > deadline:
            late = all(status in (None, 0) for status in statuses)
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + seconds
        time.sleep(0.003)
    return {"statuses": statuses, "late": late}


def _start(job: dict[str, Any], private: tuple[int, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        for descriptor in private:
            os.close(descriptor)
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(job.get("environment", {}))
        from tests.faults.job import main as work

        work(job)
        code = 0
    except BaseException as error:  # as the interpreter does it, without leaving this function
        code = _told(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _told(error: BaseException) -> int:
    """Ends as a program does that this error ends."""
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return int(error.code or 0)
    traceback.print_exception(error)
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1


if __name__ == "__main__":
    main()
