"""`trl demo`, `trl report` and `trl doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl import startup
from trl.cli import places, reward_sources
from trl.cli.arguments import Invocation
from trl.cli.catalogue import STAGES
from trl.cli.configs import command_of
from trl.cli.problems import UsageError
from trl.cli.resolve import resolve
from trl.cli.run_table import existing_run
from trl.untrusted import visible

_PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "pyarrow", "rich", "tensorboard", "wandb", "trackio",
    "mlflow",
)  # fmt: skip


def demo(invocation: Invocation) -> int:
    """`trl demo`: `python -m trl.demo`."""
    from trl.demo.__main__ import main

    words = [word for name, values in invocation.options.items() for word in (f"--{name}", *values) if word]
    try:
        return main(words)
    except SystemExit as stopped:  # of argparse, which has said why
        return int(stopped.code or 0)


def report(invocation: Invocation) -> int:
    """`trl report RUN ...`."""
    import webbrowser

    from trl.report import serve, summary_of, write_report

    runs = [existing_run(name) for name in invocation.arguments]
    if invocation.has("watch"):
        with suppress(KeyboardInterrupt), serve(runs, port=invocation.number("port") or 0) as server:
            print(f"{server.url} shows the report; Ctrl-C stops the server", flush=True)
            if invocation.has("open"):
                webbrowser.open(server.url)
            server.wait()
        return 0
    out = invocation.option("out")
    path = write_report(runs, None if out is None else Path(out))
    for run in runs:
        head = f"{places.shown_path(run)}: " if len(runs) > 1 else ""
        sys.stderr.write(visible(head + "\n".join(summary_of(run))) + "\n")
    print(path)
    if invocation.has("open"):
        webbrowser.open(path.resolve().as_uri())
    return 0


def doctor(invocation: Invocation) -> int:
    """`trl doctor [CONFIG.yaml | RUN]`. Exit code 1 if there is an error."""
    if not invocation.arguments and not invocation.flags:
        print("\n".join(_environment()))
        return 0
    run = bool(invocation.arguments) and not Path(invocation.arguments[0]).is_file()
    if run:
        from trl.doctor import examine_run

        findings = examine_run(existing_run(invocation.arguments[0]))
    else:
        findings = _examine(invocation)
    for finding in findings:
        print(visible(str(finding)))
    if not findings:
        print("no lasting trouble found; trl report shows every metric" if run else "nothing found")
    return int(any(finding.severity == "error" for finding in findings))


def _examine(invocation: Invocation) -> list[Any]:
    """Findings about a configuration, from a trainer that does not train."""
    if (command := command_of(invocation.arguments)) in STAGES:
        raise UsageError(
            f"trl doctor examines configurations of trl ppo and grpo; trl {command} --dry-run checks this one"
        )
    resolved = resolve("ppo", files=invocation.arguments, environment=invocation.environment, flags=invocation.flags)
    places.check(resolved, trains=False)
    reward_sources.check(resolved)
    from trl.cli import building
    from trl.doctor import examine

    building.quiet()
    prompts, _ = building.prompts(resolved)
    reward = reward_sources.build(resolved)
    try:
        trainer = building.trainer("ppo", resolved, steps=1)
        return list(examine(trainer, prompts, reward, building.generation(resolved)))
    finally:
        reward.close()


def _environment() -> Iterator[str]:
    """Lines about versions, devices and threads."""
    import platform

    import torch

    from trl import __version__
    from trl.kernels.door import kernels_enabled

    yield f"trl           {__version__}, {Path(__file__).resolve().parents[1]}"
    yield f"python        {platform.python_version()}, {sys.executable}"
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = f"not installed (pip install {name})"
        yield f"{name:<13} {version}"
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield f"device        {', '.join(devices) or 'cpu'}"
    yield f"threads       {torch.get_num_threads()} on {startup.cores()} cores"
    waiting = [f"{name}={os.environ[name]}" for name in startup.WAITING_CHOICES if name in os.environ]
    yield f"waiting       {', '.join(waiting) or 'the default of OpenMP'}"
    yield f"kernels       {'on' if kernels_enabled() else 'off'}"
    if (note := startup.busy_note()) is not None:
        yield f"load          {note}"
