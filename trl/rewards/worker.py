"""Worker process of an isolated reward: reads samples and writes rows, both as JSON lines.

Started by `trl.rewards.isolated`. Imports only the standard library and what the reward itself imports.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from trl.rewards.failures import Failure
from trl.rewards.isolation import guarded
from trl.rewards.signature import Binding, resolve
from trl.rewards.values import encode, read_answer


def main() -> None:
    """Serves one reward until the request pipe closes. `sys.argv` holds its path and both descriptors."""
    path, requests_fd, answers_fd = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    del sys.argv[1:]  # hide them from the reward
    for descriptor in (requests_fd, answers_fd):
        os.set_inheritable(descriptor, False)
    faulthandler.enable()  # prints the stack on a crash
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(requests_fd, "rb") as requests, os.fdopen(answers_fd, "wb") as answers:
        function, greeting = _load(path)
        _send(answers, greeting)
        if function is None:
            return
        binding = Binding.from_json(greeting["binding"])
        for line in requests:
            request = json.loads(line)
            if request["numbers"] is not None:
                _seed(line)
            # Ends a hung call even if the trainer is gone, and prints the stack to show where it hung.
            if request["seconds"] is not None:
                faulthandler.dump_traceback_later(request["seconds"], exit=True)
            answer = _answer(function, binding, request)
            faulthandler.cancel_dump_traceback_later()
            _flush()
            _send(answers, answer)


def _load(path: str) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    parent_pid = os.getpid()
    try:
        function = resolve(path)
        return function, {"binding": Binding.of(function, path).to_json()}
    except BaseException as error:  # including SystemExit: reported as an import failure
        return None, _failure_message(error)
    finally:
        if os.getpid() != parent_pid:
            os._exit(0)


def _answer(function: Callable[..., Any], binding: Binding, request: dict[str, Any]) -> dict[str, Any]:
    samples = [_sample(binding, fields) for fields in request["samples"]]
    try:
        answer = guarded(function, *binding.arguments(samples, request["columns"]))
        return {"rows": encode(read_answer(answer, request["lengths"]))}
    except BaseException as error:  # reported to the trainer; the worker keeps running
        return _failure_message(error)


def _seed(request: bytes) -> None:
    """Seeds `random`, and NumPy and torch if they are loaded, from a hash of the request."""
    seed = int.from_bytes(hashlib.sha256(request).digest()[:7], "big")
    random.seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _sample(binding: Binding, fields: dict[str, Any]) -> Any:
    if not binding.samples:
        return SimpleNamespace(**fields)
    from trl.types import Sample  # imports torch, so only for rewards that take samples

    fields |= {name: tuple(fields[name]) for name in ("prompt_ids", "completion_ids")}
    return Sample(**fields)


def _failure_message(error: BaseException) -> dict[str, Any]:
    failure = Failure.of(error)
    return {"failure": {"line": failure.line, "traceback": failure.traceback}}


def _flush() -> None:
    # The reward may have closed or replaced stdout.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()


def _send(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode("ascii") + b"\n")
    stream.flush()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)
