"""What a run shows while it is under way."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from trl.runs import progress
from trl.runs.progress import NoProgress, PlainProgress, RichProgress, clock, progress_for

ROW = {"score/mean": 0.5, "objective/kl": float("nan"), "time/tokens_per_second": 1234.4}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_at_the_start_for_evaluations_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = progress_for(None, done=2, target=12, stream=stream)
    assert isinstance(shown, PlainProgress)
    for step in range(3, 13):
        now[0] += 3
        shown.update(step, ROW | ({"eval/score_mean": 2.0} if step == 4 else {}))
    shown.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 3/12  score 0.500  KL -  1234 tokens/s  ETA 0:27"
    assert lines[1] == "step 4/12  score 0.500  KL -  held-out score 2.000  1234 tokens/s  ETA 0:24"
    assert [line.split()[1] for line in lines] == ["3/12", "4/12", "8/12", "12/12"]
    assert "\x1b" not in stream.getvalue()


def test_what_comes_before_the_first_step_has_a_line_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = progress_for(None, done=0, target=3, stream=stream)
    now[0] += 50
    shown.update(0, {"eval/score_mean": 0.125})
    now[0] += 3
    shown.update(1, ROW)
    assert stream.getvalue().splitlines() == [
        "before training: held-out score 0.125",
        "step 1/3  score 0.500  KL -  1234 tokens/s  ETA 0:06",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = progress_for(None, done=0, target=4, stream=stream)
    assert isinstance(shown, RichProgress)
    shown.update(3, ROW)
    shown.close()
    assert "3/4" in stream.getvalue() and "score 0.500" in stream.getvalue() and "━" in stream.getvalue()


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert isinstance(progress_for(None, done=0, target=4, stream=Terminal()), PlainProgress)


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress_for(False, done=0, target=4)
    assert isinstance(shown, NoProgress)
    shown.update(1, ROW)
    shown.close()
    assert capsys.readouterr() == ("", "")


def test_names_and_texts_of_a_run_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Completions, and what a reward says about them, are written to files alone."""
    from tests.trainer.managed import run

    hostile = "\x1b]0;owned\x07[red]"
    prompts: list[Any] = [{"prompt": f"w4{i}", "prompt_id": f"{hostile}{i}"} for i in range(4)]
    run(prompts=prompts, reward={hostile: lambda prompts, completions: [1.0] * 4}, steps=1, progress=None)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("step 1/1  score 1.000")
    assert "\x1b]0;" not in shown.err and "owned" not in shown.err


@pytest.mark.parametrize(("seconds", "text"), [(7.9, "0:07"), (61, "1:01"), (3723, "1:02:03")])
def test_times_are_shown_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_standard_error_is_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress_for(True, done=0, target=1).update(1, ROW)
    assert stream.getvalue().startswith("step 1/1")
