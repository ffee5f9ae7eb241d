"""What a recorder of sparse rows writes; runs with a row per step are in tests/trainer/test_train_survives.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from trl.runs.recorder import Recorder
from trl.trackers import read_metrics


def test_rows_need_no_samples_and_not_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True)
    recorder = Recorder(accelerator, tmp_path / "run", resume=False)
    recorder.begin(0, None, {"train": {"steps": 9}})
    for step in (2, 4, 6):
        recorder.record(step, {"loss": 1 / step})
    recorder.saved(5, 0.1)
    recorder.close()
    assert not any((tmp_path / "run" / "completions").iterdir())
    recorder = Recorder(accelerator, tmp_path / "run", resume="auto")
    recorder.begin(5, tmp_path, {"train": {"steps": 10}}, last_row=4)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [2, 4] and recorder.last_step == 5
    events = (tmp_path / "run" / "events.log").read_text()
    assert "setting changed: train.steps: 9 -> 10" in events and "incomplete" not in events + caplog.text
    recorder.close()


def test_a_row_that_is_gone_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(Accelerator(cpu=True), tmp_path / "run", resume=False)
    recorder.begin(5, tmp_path, {}, last_row=4)
    assert "expected rows up to step 4; the last step in it is none" in caplog.text
    recorder.close()


def test_messages_name_the_callers_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"again=True, but .* contains no run; again='auto' would start one"):
        Recorder(Accelerator(cpu=True), tmp_path / "run", resume=True, argument="again")
