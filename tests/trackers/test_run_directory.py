from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from trl.files import STAGING
from trl.trackers import CompletionRecord, RunDirectory, read_completions, read_metrics, without_times

ROOT = Path(__file__).resolve().parents[2]
EVENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


def record(number: int = 0, **changes: Any) -> CompletionRecord:
    values: dict[str, Any] = dict(
        prompt_id=str(number),
        prompt="The film was",
        completion=" a joy",
        rewards={"joy": 0.25 + number, "length": None},
        score=0.5,
        advantage=-0.125,
        kl=0.75,
        length=2,
        finish_reason="stop",
        reward_seconds=0.01,
    )
    return CompletionRecord(**(values | changes))


def events(run: RunDirectory) -> list[str]:
    lines = (run.path / "events.log").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == "" and all(EVENT.match(line) for line in lines)
    return [EVENT.sub("", line) for line in lines]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with RunDirectory.create("run", root=tmp_path) as made:
        yield made


# Making and opening --------------------------------------------------------------------------------------------------


def test_a_new_run(run: RunDirectory, tmp_path: Path) -> None:
    assert run.path == (tmp_path / "run").resolve()
    names = {".lock", "checkpoints", "completions", "environment.json", "events.log", "metrics.jsonl"}
    assert {entry.name for entry in run.path.iterdir()} == names
    assert events(run) == ["run created"]
    assert run.checkpoints.is_dir()


def test_environment_says_what_it_ran_on_and_nothing_of_the_environment(run: RunDirectory) -> None:
    text = (run.path / "environment.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert (
        found["packages"]["torch"] == torch.__version__.split("+")[0] or found["packages"]["torch"] in torch.__version__
    )
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["cores"] == os.cpu_count() and found["machine"]["memory_bytes"] > 0
    if (ROOT / ".git").exists():
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert found["git"]["commit"] == commit
    assert os.environ["PATH"] not in text and os.uname().nodename not in text


def test_a_run_is_not_written_over(run: RunDirectory, tmp_path: Path) -> None:
    run.close()
    with pytest.raises(ValueError, match="already holds a run: resume it or choose another folder"):
        RunDirectory.create("run", root=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty \(thesis\.tex, \.\.\.\)"):
        RunDirectory.create(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis\.tex is a file"):
        RunDirectory.create(tmp_path / "mine/thesis.tex")


def test_open_wants_a_run(tmp_path: Path) -> None:
    for name in (".", "gone"):
        with pytest.raises(ValueError, match="is not a run folder"):
            RunDirectory.open(tmp_path / name)
        assert not RunDirectory.exists(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_run_killed_while_it_was_made_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every single file that `create` makes, up to the first event."""
    import trl.trackers.run_directory as module

    class Killed(BaseException):
        pass

    real = module.write_atomic
    for survived in (0, 1):
        calls: list[Path] = []

        def killed(path: Path, data: bytes, calls: list[Path] = calls, survived: int = survived) -> None:
            if len(calls) == survived:
                (path.parent / f"{STAGING}{path.name}-half").write_bytes(b"half")
                raise Killed
            calls.append(path)
            real(path, data)

        folder = tmp_path / str(survived)
        monkeypatch.setattr(module, "write_atomic", killed)
        with pytest.raises(Killed):
            RunDirectory.create(folder)
        monkeypatch.setattr(module, "write_atomic", real)
        assert not RunDirectory.exists(folder)
        with RunDirectory.create(folder) as run:
            assert events(run) == ["run created"] and list(folder.glob(f"{STAGING}*")) == []


def test_what_changed_about_the_machine_is_an_event(run: RunDirectory) -> None:
    path = run.path / "environment.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    old = before | {"packages": before["packages"] | {"torch": "1.0"}}
    path.write_text(json.dumps(old), encoding="utf-8")
    run.close()
    with RunDirectory.open(run.path) as again:
        now = before["packages"]["torch"]
        assert f"environment changed: packages.torch: 1.0 -> {now}" in events(again)
        assert json.loads(path.read_text(encoding="utf-8"))["packages"]["torch"] == now


# Settings and summary ------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass
class Settings:
    rate: float = 1e-5
    path: Path = Path("a/b")
    colour: Colour = Colour.RED
    dtype: Any = torch.bfloat16
    reward: Any = record
    weights: Any = field(default_factory=lambda: np.array([0.5, 1.0]))
    big: Any = field(default_factory=lambda: torch.zeros(100, 2))
    names: set[str] = field(default_factory=lambda: {"b", "a"})
    nested: dict[Any, Any] = field(default_factory=lambda: {1: (True, None, np.float32(0.5))})
    thing: Any = field(default_factory=object)
    text: str = "é: \x00 no\udc80 yes\n- 'x'"
    pad_token: str = "<pad>"
    infinite: float = float("inf")


def test_config_is_plain_yaml(run: RunDirectory) -> None:
    assert run.read_config() is None
    run.write_config(Settings())
    text = (run.path / "config.resolved.yaml").read_text(encoding="utf-8")
    assert "!!python" not in text and "0x" not in text
    expected = {
        "rate": 1e-5,
        "path": "a/b",
        "colour": "red",
        "dtype": "torch.bfloat16",
        "reward": f"{__name__}:record",
        "weights": [0.5, 1.0],
        "big": "<torch:Tensor of shape [100, 2]>",
        "names": ["a", "b"],
        "nested": {"1": [True, None, 0.5]},
        "thing": "<builtins:object>",
        "text": "é: \x00 no\\udc80 yes\n- 'x'",
        "pad_token": "<pad>",
        "infinite": float("inf"),
    }
    assert run.read_config() == expected == yaml.safe_load(text)
    assert list(run.read_config()) == list(expected)


def test_s13_config_is_safely_loaded(run: RunDirectory, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    text = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{fired}']]\n"
    (run.path / "config.resolved.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.resolved\.yaml is not valid YAML: .*python/object"):
        run.read_config()
    assert not fired.exists()


def test_s13_a_small_config_stays_small_in_memory(run: RunDirectory) -> None:
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    for text in (f"a0: &a0 x\n{bomb}", "[" * 5000):
        (run.path / "config.resolved.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"config\.resolved\.yaml is not valid YAML"):
            run.read_config()


def test_summary(run: RunDirectory) -> None:
    run.write_summary({"steps": 3, "best": float("nan"), "text": "\u2028"})
    data = (run.path / "summary.json").read_bytes()
    assert json.loads(data) == {"steps": 3, "best": None, "text": "\u2028"} and data.isascii()


# Rows, samples, events -----------------------------------------------------------------------------------------------


def test_rows_are_there_at_once_and_in_order(run: RunDirectory) -> None:
    run.log({"loss": 0.5, "time/step": 1.0}, step=1)
    assert read_metrics(run.path) == [{"step": 1, "loss": 0.5, "time/step": 1.0}]
    run.log({"loss": 0.25}, step=3)
    for step in (3, 2):
        with pytest.raises(ValueError, match=f"already has a row for step 3; step {step} must be higher"):
            run.log({}, step=step)
    run.close()
    with RunDirectory.open(run.path) as again, pytest.raises(ValueError, match="already has a row for step 3"):
        again.log({}, step=3)


def expected_row(step: int, number: int, joy: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "prompt_id": str(number),
        "prompt": "The film was",
        "completion": " a joy",
        "reward/joy": joy,
        "reward/length": None,
        "score": 0.5,
        "advantage": -0.125,
        "kl": 0.75,
        "length": 2,
        "finish_reason": "stop",
        "time/reward": 0.01,
        "error": None,
        "tokens": None,
    }
    return row | changes


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_samples(
    run: RunDirectory, suffix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if suffix == "jsonl":
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    failed = record(
        1, completion="\udc80\x00 <script>\u2028é", rewards={}, score=None, kl=float("nan"), error="ValueError: \udcff"
    )
    with caplog.at_level(logging.WARNING):
        run.log_completions([record(tokens={"text": [" a", " joy"], "kl": [0.5, math.nan]}), failed], step=12)
        run.log_completions([], step=13)
    expected = [
        expected_row(12, 0, 0.25, tokens='{"text": [" a", " joy"], "kl": [0.5, null]}'),
        expected_row(
            12, 1, None, completion="\\udc80\x00 <script>\u2028é", score=None, kl=None, error="ValueError: \\udcff"
        ),
    ]
    assert read_completions(run.path, 12) == expected
    assert list(read_completions(run.path, 12)[0]) == list(expected[0])
    assert read_completions(run.path, 13) == []
    names = sorted(path.name for path in (run.path / "completions").iterdir())
    assert names == [f"step-00000012.{suffix}", f"step-00000013.{suffix}"]
    said = [message for message in caplog.messages if "pyarrow is not installed" in message]
    assert len(said) == (suffix == "jsonl")
    with pytest.raises(ValueError, match="no completions for step 14"):
        read_completions(run.path, 14)


def test_a_column_of_which_nothing_is_known_has_its_type(run: RunDirectory) -> None:
    import pyarrow.parquet

    unknown = record(score=None, advantage=None, kl=None, reward_seconds=None, rewards={"joy": None})
    run.log_completions([unknown], step=1)
    schema = pyarrow.parquet.read_schema(run.path / "completions/step-00000001.parquet")
    kinds = {name: str(kind) for name, kind in zip(schema.names, schema.types)}
    assert {kinds[name] for name in ("reward/joy", "score", "advantage", "kl", "time/reward")} == {"double"}
    assert {kinds[name] for name in ("prompt_id", "prompt", "completion", "finish_reason", "error")} == {"string"}


def test_a_component_may_have_any_name(run: RunDirectory) -> None:
    run.log_completions([record(rewards={"password": 0.5, "api_key": 1.0})], step=1)
    (row,) = read_completions(run.path, 1)
    assert (row["reward/password"], row["reward/api_key"]) == (0.5, 1.0)


def test_an_event_is_one_line_without_control_characters(run: RunDirectory) -> None:
    run.event("a\nb\r\nc\td \x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b5m\x00\x7f\x85 \u2028 \u202eback é\udc80")
    assert events(run)[-1] == "a\\nb\\nc d red    back é\\udc80"
    run.event("x" * 10_000_000)
    assert events(run)[-1].endswith("x... (9980000 more characters)")


def test_full_disk_is_an_error_that_leaves_no_half_of_a_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log({"a": 1}, step=1)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for write in (
            lambda: run.log({"a": 2}, step=2),
            lambda: run.event("x"),
            lambda: run.log_completions([record()], step=2),
            lambda: run.write_config({}),
            lambda: run.write_summary({}),
        ):
            with pytest.raises(OSError, match="No space left"):
                write()
    run.log({"a": 2}, step=2)
    assert read_metrics(run.path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]
    assert list(run.path.rglob(f"{STAGING}*")) == []


def test_sync_reaches_both_files_that_grow(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    run.sync()
    assert {Path(path).name for path in synced} == {"metrics.jsonl", "events.log"}


# Resuming ------------------------------------------------------------------------------------------------------------


def write_step(run: RunDirectory, step: int) -> None:
    noise = np.random.default_rng(step).standard_normal(3).tolist()
    run.log({"loss": noise[0], "bad": float("nan") if step % 2 else noise[1], "time/step": time.perf_counter()}, step)
    run.log_completions([record(n, score=noise[2], reward_seconds=time.perf_counter()) for n in range(2)], step)


def contents(run: RunDirectory) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    files = sorted((run.path / "completions").iterdir())
    steps = {path.name: read_completions(run.path, int(path.stem.removeprefix("step-"))) for path in files}
    samples = {name: [without_times(row) for row in rows] for name, rows in steps.items()}
    return [without_times(row) for row in read_metrics(run.path)], samples


@pytest.mark.parametrize("saved", [0, 1, 3, 5])
@pytest.mark.parametrize("half", [b"", b'{"step": 6, "lo', b"\0\0\0"])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(tmp_path: Path, saved: int, half: bytes) -> None:
    with RunDirectory.create(tmp_path / "whole") as whole:
        for step in range(1, 8):
            write_step(whole, step)
    run = RunDirectory.create(tmp_path / "run")
    for step in range(1, 6):
        write_step(run, step)
    run.write_summary({"steps": 5})
    bytes_of_rows = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("metrics.jsonl", "events.log"):
        with (run.path / name).open("ab") as file:
            file.write(half)
    (run.path / "completions/.staging-step-00000006.parquet-half").write_bytes(b"half")
    run.close()

    with RunDirectory.open(tmp_path / "run") as run:
        assert run.truncate_after(saved) == (5 - saved, 5 - saved)
        assert (run.path / "metrics.jsonl").read_bytes() == b"".join(bytes_of_rows[:saved])
        left = sorted(path.name for path in (run.path / "completions").iterdir())
        assert left == [f"step-{step:08d}.parquet" for step in range(1, saved + 1)]
        assert not (run.path / "summary.json").exists()
        for step in range(saved + 1, 8):
            write_step(run, step)
        assert contents(run) == contents(whole)
        removed = f"removed the records after step {saved}: {5 - saved} metrics rows, {5 - saved} completion files"
        assert (removed in events(run)) == (saved < 5)
        assert not any("lacks" in line for line in events(run))


def test_rows_that_a_power_cut_took_are_missed_aloud(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        write_step(run, step)
    with caplog.at_level(logging.WARNING):
        assert run.truncate_after(4) == (0, 0)
    assert "metrics.jsonl is incomplete: expected rows up to step 4; the last step in it is 2" in caplog.text
    assert events(run)[-1] == "metrics.jsonl is incomplete: expected rows up to step 4; the last step in it is 2"


def test_damage_in_the_middle_is_named(run: RunDirectory) -> None:
    for step in (1, 2, 3):
        write_step(run, step)
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b'"step"', b'"stop"') + lines[2])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics row"):
        run.truncate_after(3)
    run.close()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a metrics row"):
        RunDirectory.open(run.path)


WRITE = """
import sys
from trl.trackers import RunDirectory

run = RunDirectory.create(sys.argv[1])
print("made", flush=True)
step = 0
while True:
    step += 1
    run.log({"a": step / 3, "time/x": 0.5}, step)
    run.event(f"step {step}")
    run.write_summary({"step": step})
"""


@pytest.mark.parametrize("wait", [0.0, 0.107, pytest.param(0.031, marks=pytest.mark.slow)])
def test_kill_9_while_writing(tmp_path: Path, wait: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        time.sleep(0.05 + wait)
        process.send_signal(signal.SIGKILL)
    with RunDirectory.open(tmp_path / "run") as run:
        rows = read_metrics(run.path)
        assert len(rows) > 1
        assert rows == [{"step": step, "a": step / 3, "time/x": 0.5} for step in range(1, len(rows) + 1)]
        assert json.loads((run.path / "summary.json").read_text(encoding="utf-8"))["step"] in (len(rows), len(rows) - 1)
        assert list(run.path.glob(f"{STAGING}*")) == []
        run.truncate_after(1)
        run.log({}, 2)


def test_reading_a_run_takes_no_torch() -> None:
    script = (
        "import sys, trl.trackers, trl.redaction, trl.files; assert not {'torch', 'pyarrow', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# Secrets -------------------------------------------------------------------------------------------------------------

CANARIES = [
    "canary-hf-1234",
    "canary-key-5678",
    "canary-secret-9012",
    "canary-pass-3456",
    "canary-url-7890",
    "canary-n-1",
]


def test_s9_no_secret_reaches_anything_in_the_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["HF_TOKEN", "OPENAI_API_KEY", "MY_SECRET", "DB_PASSWORD_MAIN"]
    for name, value in zip(names, CANARIES):
        monkeypatch.setenv(name, value)
    everything = " ".join([*CANARIES[:4], f"https://me:{CANARIES[4]}@host/x", f"X_TOKEN={CANARIES[5]}"])
    run = RunDirectory.create(tmp_path / "run")
    nested = {"token": CANARIES[5], "env": dict(os.environ), "deep": [{"apiKey": CANARIES[4]}, everything]}
    run.write_config({"kwargs": nested, "url": f"redis://:{CANARIES[4]}@host", f"key {CANARIES[0]}": 1})
    run.log({everything: 0.5, "text": everything, f"nan {CANARIES[0]}": float("nan")}, 1)
    texts = dict(prompt_id=everything, prompt=everything, completion=everything, finish_reason=everything)
    hostile = record(rewards={everything: 1.0}, error=f"HTTPError: {everything}", **texts)
    run.log_completions([hostile], 1)
    run.event(everything)
    run.event("broken up: " + CANARIES[0].replace("-", "-\x1b[0m\x00"))
    run.write_summary(nested | {"error": everything})
    run.close()
    with RunDirectory.open(run.path) as run:
        run.truncate_after(1)
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
        run.log_completions([hostile], 2)
        run.write_summary(nested)

    written = {path.name: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    expected = {"config.resolved.yaml", "metrics.jsonl", "events.log", "environment.json", "summary.json"}
    assert expected | {"step-00000001.parquet", "step-00000002.jsonl"} <= set(written)
    # Parquet is compressed: what it says is looked at as text, too.
    written["samples"] = "".join(str(read_completions(run.path, step)) for step in (1, 2)).encode()
    for name, data in written.items():
        for canary in CANARIES:
            assert canary.encode() not in data, f"{canary} is in {name}"
    assert written["samples"].count(b"[redacted]") > 40
