"""Reward functions that misbehave, at the top level of a module so that another process finds them."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import subprocess
import sys
import time
from typing import Any


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def with_columns(prompts: list[str], completions: list[str], answer: list[int], **columns: Any) -> list[float]:
    return [float(a + b) for a, b in zip(answer, columns["more"])]


def of_samples(samples: list[Any]) -> list[float]:
    return [sample.columns["answer"] + len(sample.completion_ids) for sample in samples]


def per_token(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[list[float]]:
    return [[token / 2 for token in ids] for ids in completion_ids]


async def asynchronous(prompts: list[str], completions: list[str]) -> list[float]:
    return length(prompts, completions)


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    raise KeyError("no such thing")


def sleeps(prompts: list[str], completions: list[str]) -> list[float]:
    time.sleep(1000)
    return []


def hangs_in_c(prompts: list[str], completions: list[str]) -> list[float]:
    ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock: no thread and no Python signal handler runs
    return []


def switches_its_watchdog_off(prompts: list[str], completions: list[str]) -> list[float]:
    faulthandler.cancel_dump_traceback_later()
    return hangs_in_c(prompts, completions)


def not_a_number(prompts: list[str], completions: list[str]) -> list[float]:
    return [float("nan"), 1.0]


def none(prompts: list[str], completions: list[str]) -> Any:
    return None


def wrong_length(prompts: list[str], completions: list[str]) -> list[float]:
    return [1.0]


def wrong_type(prompts: list[str], completions: list[str]) -> list[Any]:
    return ["good", 1.0]


def a_generator(prompts: list[str], completions: list[str]) -> Any:
    return (1.0 for _ in completions)


def prints(prompts: list[str], completions: list[str]) -> list[float]:
    line = "x" * (1 << 20)
    for _ in range(int(os.environ["PRINTED_MEGABYTES"])):
        sys.stdout.write(line)
    return length(prompts, completions)


def exits(prompts: list[str], completions: list[str]) -> list[float]:
    sys.exit(3)


def exits_hard(prompts: list[str], completions: list[str]) -> list[float]:
    print("about to leave")
    sys.stdout.flush()
    os._exit(3)


def crashes(prompts: list[str], completions: list[str]) -> list[float]:
    ctypes.string_at(0)
    return []


def forks_and_both_return(prompts: list[str], completions: list[str]) -> list[float]:
    os.fork()
    return length(prompts, completions)


def leaves_children(prompts: list[str], completions: list[str]) -> list[float]:
    """A child in the process group, one in a session of its own, and one whose parent is gone; then hangs."""
    same = subprocess.Popen(["sleep", "1000"])
    other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True"
    orphan = f"import subprocess; print(subprocess.Popen(['sleep', '1000'], {quiet}).pid)"
    lost = subprocess.run([sys.executable, "-S", "-c", orphan], capture_output=True, text=True)
    with open(os.environ["CHILDREN_FILE"], "w") as file:
        file.write(f"{same.pid} {other.pid} {lost.stdout.strip()}")
    return sleeps(prompts, completions)


def draws(prompts: list[str], completions: list[str]) -> list[float]:
    return [random.random() for _ in completions]


def closes_everything(prompts: list[str], completions: list[str]) -> list[float]:
    os.closerange(0, 256)
    time.sleep(1000)
    return []


def exits_once(prompts: list[str], completions: list[str]) -> list[float]:
    path = os.environ["EXITED_FILE"]
    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    return length(prompts, completions)


class Scorer:
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return length(prompts, completions)


an_object = Scorer()
unreadable = 17
