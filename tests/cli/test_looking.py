"""`trl report`, `trl doctor` and `trl demo`, which hand on to their packages."""

from __future__ import annotations

import re
import urllib.request
import webbrowser
from pathlib import Path

import pytest

from tests.cli.helpers import write_project
from trl.cli.app import main
from trl.report.live import ReportServer


def test_report_of_runs(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    run = str(finished_run / "runs" / "run")
    assert main(["report", run, run, "--out", "both.html", "--open"]) == 0
    told = capsys.readouterr()
    assert told.out == "both.html\n" and told.err.count("run: Finished at step 2 of 2") == 2
    assert opened == [(tmp_path / "both.html").as_uri()]
    assert main(["report", run]) == 0
    told = capsys.readouterr()
    assert told.out == f"{run}/report.html\n"
    assert told.err.startswith("Finished at step 2 of 2") and "On held-out prompts the score went from" in told.err


def test_watch_serves_on_this_machine_until_ctrl_c(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[bytes] = []

    def look_and_stop(server: ReportServer) -> None:
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            pages.append(answer.read())
        raise KeyboardInterrupt

    monkeypatch.setattr(ReportServer, "wait", look_and_stop)
    assert main(["report", str(finished_run / "runs" / "run"), "--watch"]) == 0
    (page,) = pages
    assert b'id="live"' in page
    assert re.match(r"http://127\.0\.0\.1:\d+/ shows the report", capsys.readouterr().out)
    assert main(["report", str(finished_run / "runs" / "run"), "--watch", "--port", "65536"]) == 1
    assert "port=65536 must be between 0 and 65535" in capsys.readouterr().err


def test_doctor(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("torch ", "device ", "threads ", "waiting ", "peft "))
    assert main(["doctor", str(finished_run / "runs" / "run")]) == 0
    write_project(tmp_path)
    (tmp_path / "rewards.py").write_text("def polite(prompts, completions):\n    return [1.0 for _ in completions]\n")
    capsys.readouterr()
    main(["doctor", "run.yaml", "--batch-size", "16"])
    assert "constant-reward" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("trl.demo.__main__.main", lambda words: given.append(words) or 0)
    assert main(["demo", "--steps", "2", "--out=x"]) == 0
    assert given == [["--steps", "2", "--out", "x"]]


def test_demo_says_what_is_wrong_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--steps", "many"]) == 2
    assert main(["demo", "--batch-size", "10"]) == 2
    assert "batch_size=10" in capsys.readouterr().err
