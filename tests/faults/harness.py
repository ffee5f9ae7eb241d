"""Starting runs that are killed, and comparing what becomes of them with the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL

# Where a run is killed, and how often in a row of points.
PLACES = (
    "sampling", "save/write", "before backward", "scoring", "save/fsync", "after step", "evaluation", "save/replace",
    "after backward", "sampling", "save/mkdir", "before step", "save/write half", "scoring", "record/write",
    "save/rmdir", "evaluation", "save/unlink", "record/fsync", "after step", "record/replace", "record/write half",
    "append/write", "append/write half", "model",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the processes of a run ended."""

    statuses: list[int]
    log: str
    report: dict[str, Any] = field(default_factory=dict)  # empty unless the run came to its end

    @property
    def status(self) -> int:
        """Of the first process."""
        return self.statuses[0]


class Server:
    """Forks runs off a process that has the libraries imported."""

    def __init__(self) -> None:
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "ACCELERATE_USE_CPU": "true",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, folder: Path, job: Mapping[str, Any], *, ranks: int = 1, seconds: float = 60) -> Ended:
        """Trains in `folder`/run until the run ends, one way or another.

        Args:
            folder: of this run; called again, it goes on with the run.
            job: see job.py. Orders that name a `rank` are for that process alone.
            ranks: data-parallel processes.
            seconds: after which a run hangs.
        """
        report, log = folder / "report.json", folder / "log.txt"
        report.unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        start = log.stat().st_size if log.exists() else 0
        common = {"run_dir": str(folder / "run"), "report": str(report), "log": str(log), **job}
        jobs = [common | _of_rank(common, rank) for rank in range(ranks)]
        if ranks > 1:
            port = str(_free_port())
            for rank, one in enumerate(jobs):
                one["environment"] = _environment(rank, ranks, port)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"jobs": jobs, "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        text = log.read_bytes()[start:].decode(errors="replace")
        assert not answer["late"], f"a run did not end within {seconds} s:\n{text[-3000:]}"
        found = json.loads(report.read_text()) if report.exists() else {}
        return Ended(statuses=answer["statuses"], log=text, report=found)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _of_rank(job: Mapping[str, Any], rank: int) -> dict[str, Any]:
    return {"orders": [order for order in job.get("orders", ()) if order.get("rank", rank) == rank]}


def _environment(rank: int, ranks: int, port: str) -> dict[str, str]:
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


# Comparing -----------------------------------------------------------------------------------------------------------


def differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Where two reports differ, a line each; what was counted on the way does not matter."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [name for name in {**wanted, **found} if where or name != "counts"]
        return [
            line
            for name in names
            for line in differences(found.get(name, "nothing"), wanted.get(name, "nothing"), f"{where}/{name}")
        ]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{where}/{i}")]
    return [] if found == wanted else [f"{where} is {str(found)[:60]}, not {str(wanted)[:60]}"]


# Killing -------------------------------------------------------------------------------------------------------------


def kill_points(counts: Mapping[str, int], number: int, seed: int) -> list[dict[str, Any]]:
    """Orders to kill a run, spread over everything that it does.

    Args:
        counts: how often each kind happens in the run that is left alone.
        number: of orders.
        seed: draws at which of its events each kind is met.
    """
    chance = random.Random(seed)
    places = [place for place in PLACES if counts.get(place.removesuffix(" half"), 0)]
    orders = []
    for i in range(number):
        kind = places[i % len(places)].removesuffix(" half")
        act = "half" if places[i % len(places)].endswith(" half") else "SIGKILL"
        orders.append({"kind": kind, "n": chance.randint(1, counts[kind]), "act": act})
    return orders


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What became of a run that was killed and gone on with."""

    orders: list[dict[str, Any]]
    kills: int
    differences: list[str]


def survive(
    server: Server, folder: Path, job: Mapping[str, Any], wanted: Mapping[str, Any], orders: Sequence[dict[str, Any]],
    ranks: int = 1,
) -> Survival:  # fmt: skip
    """Kills a run at the first order, what goes on with it at the second, ...; then lets it end.

    A later order counts from the resumption: its event may not come any more, and the run has ended then.
    """
    for kills, order in enumerate(orders):
        ended = server.run(folder, {**job, "orders": [order]}, ranks=ranks)
        if kills and set(ended.statuses) == {0}:
            return Survival(orders=list(orders), kills=kills, differences=differences(ended.report, wanted))
        assert KILLED in ended.statuses, f"{order}: ended with {ended.statuses}\n{ended.log[-3000:]}"
    ended = server.run(folder, job, ranks=ranks)
    if set(ended.statuses) != {0}:
        return Survival(orders=list(orders), kills=len(orders), differences=[ended.log[-3000:]])
    return Survival(orders=list(orders), kills=len(orders), differences=differences(ended.report, wanted))
