"""`trl runs`: what state a run is in, and which run a name means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl.cli.app import main
from trl.cli.problems import UsageError
from trl.cli.run_table import existing_run, find_runs, read_run
from trl.trackers import RunDirectory


def make(path: Path, *, steps: int = 0, summary: dict[str, object] | None = None, event: str | None = None) -> None:
    with RunDirectory.create(path) as run:
        run.write_config({"train": {"steps": 9}})
        for step in range(1, steps + 1):
            run.log({"score/mean": step / 10, "objective/kl": step / 100}, step)
        if event is not None:
            run.event(event)
        if summary is not None:
            run.write_summary(summary)


def test_states(tmp_path: Path) -> None:
    make(tmp_path / "new")
    make(tmp_path / "killed", steps=2)
    make(tmp_path / "failed", steps=1, event="failed in step 2: RewardFailed: no")
    make(tmp_path / "stopped", steps=2, summary={"reason": "SIGINT", "target": 9})
    make(tmp_path / "finished", steps=3, summary={"reason": "steps", "target": 3})
    found = {name: read_run(tmp_path / name) for name in ("new", "killed", "failed", "stopped", "finished")}
    assert {name: run.state for name, run in found.items()} == {name: name for name in found}
    assert (found["finished"].step, found["finished"].target, found["finished"].score, found["finished"].kl) == (
        3,
        3,
        0.3,
        0.03,
    )
    assert (found["killed"].step, found["killed"].target) == (2, 9)
    assert found["failed"].note == "failed in step 2: RewardFailed: no"
    with RunDirectory.open(tmp_path / "killed"):
        assert read_run(tmp_path / "killed").state == "running"


def test_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "runs" / "a" / "b", steps=1)
    make(tmp_path / "runs" / "evil", steps=1, event="failed in step 2: \x1b[31mred")
    (tmp_path / "runs" / "evil").rename(tmp_path / "runs" / "evil\u202e\u009b31m\x1b[2J")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "runs" / "a")
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert "runs/a/b" in printed and "link" not in printed
    assert "\u202e" not in printed and "\x9b" not in printed and "\x1b" not in printed  # S8
    assert main(["runs", "--json"]) == 0
    assert {Path(run["path"]).name for run in json.loads(capsys.readouterr().out)} >= {"b"}
    (tmp_path / "empty").mkdir()
    assert main(["runs", "empty"]) == 0
    assert capsys.readouterr().out == "no runs in empty\n"


def test_a_damaged_run_is_a_line_with_a_note(tmp_path: Path) -> None:
    make(tmp_path / "run", steps=2)
    (tmp_path / "run" / "metrics.jsonl").write_text('nonsense\n{"step": 2}\n')
    assert "metrics.jsonl:1" in read_run(tmp_path / "run").note
    assert list(find_runs(tmp_path)) == [tmp_path / "run"]


def test_a_run_by_path_or_name(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "polite")
    assert existing_run("runs/polite") == existing_run("polite") == tmp_path / "runs" / "polite"
    with pytest.raises(UsageError, match="polit: there is no run: did you mean polite"):
        existing_run("polit")
    with pytest.raises(UsageError, match="did you mean polite"):
        existing_run("runs/polte")
    with pytest.raises(UsageError, match=r"the folder has no events.log"):
        existing_run("runs")


@pytest.mark.parametrize("name", ["", "a\x00b", "x" * 300, "../../x", "\x1b[31m"])
def test_strange_names(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        existing_run(name)
    assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 500
