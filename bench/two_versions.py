"""Two checkouts of this library on the same job, one cycle of each in turn: what a change costs.

    git worktree add ../before COMMIT
    python bench/two_versions.py ../before . --model data/smollm2-135m --reviews data/reviews/train.jsonl --cycles 8

A machine's speed drifts by more than most changes cost, so whole runs one after the other cannot tell 3%. Here both processes are
alive, and all but the one whose cycle it is are stopped (SIGSTOP). The order changes from pair to pair, the first pair warms up and
is left out. Every option after the two folders is handed on to `bench/job.py`, whose copy in the second checkout drives both.
Another process's threads on the machine disturb both; what is printed has the spread of the pairs, so that one sees it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Side:
    """One checkout's job, stopped except while its turn lasts."""

    def __init__(self, checkout: Path, job: Path, options: list[str]) -> None:
        env = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        command = [sys.executable, str(job), *options]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        os.kill(self.process.pid, signal.SIGSTOP)

    def cycle(self) -> dict[str, float]:
        """Let it run until it reports a cycle; seconds by phase. The first one includes loading."""
        started = time.perf_counter()
        os.kill(self.process.pid, signal.SIGCONT)
        line = self.process.stdout.readline() if self.process.stdout else ""
        total = time.perf_counter() - started
        os.kill(self.process.pid, signal.SIGSTOP)
        if not line:
            raise SystemExit(f"{self.process.args} ended before its last cycle")
        row = json.loads(line)
        # The clock of `sample_s` ran on while the process was stopped.
        return {"cycle": total, "sample": total - row["step_s"], "score": row["forward_s"], "update": row["optimize_s"]}

    def close(self) -> None:
        """End it, whatever it is doing."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    checkouts, options = [Path(p).resolve() for p in sys.argv[1:3]], sys.argv[3:]
    cycles = int(options[options.index("--cycles") + 1]) if "--cycles" in options else 4
    sides = [Side(checkout, checkouts[1] / "bench" / "job.py", options) for checkout in checkouts]
    pairs: list[list[dict[str, float]]] = []
    try:
        for turn in range(cycles):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            times: Any = [None, None]
            for side in order:
                times[side] = sides[side].cycle()
            print(json.dumps({"pair": turn, "first": times[0], "second": times[1]}), flush=True)
            pairs += [times] if turn else []
    finally:
        for side in sides:
            side.close()
    for phase in ("cycle", "sample", "score", "update"):
        ratios = sorted(second[phase] / first[phase] for first, second in pairs)
        medians = [statistics.median(pair[side][phase] for pair in pairs) for side in (0, 1)]
        print(
            f"{phase:7} {medians[0]:6.2f} s, {medians[1]:6.2f} s; second over first {statistics.median(ratios):.3f}"
            f" (of {len(ratios)} pairs, {ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
