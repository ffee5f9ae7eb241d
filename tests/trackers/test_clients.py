"""Adapters to trackers, on the packages themselves where they are installed and on stand-ins of their calls."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trl.trackers import SafeTracker, completions_table
from trl.trackers.clients import (
    ADAPTERS,
    AccelerateTracker,
    Late,
    MlflowTracker,
    TensorBoardTracker,
    TrackedRun,
    TrackerIds,
    TrackioTracker,
    WandbTracker,
)

TABLE = completions_table(["prompt", "score"], [["a <b>", 0.5]])
ROW = {"score/mean": 0.5, "array": np.array([0.0, 1.0, np.nan]), "completions": TABLE, "note": "text"}


def run_in(folder: Path, step: int = 0, **options: Any) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    settings = {"learning_rate": 1e-5, "train/steps": 4, "key": "[redacted]"}
    return TrackedRun(
        project="reviews",
        name="first",
        folder=folder,
        settings=settings,
        options=options,
        step=step,
        ids=TrackerIds(folder),
    )


def interrupted(kind: Any, folder: Path, **options: Any) -> None:
    """Four steps, a kill after the checkpoint of step 2, and a resumed run to step 5."""
    tracker = kind(run_in(folder, **options))
    for step in range(1, 5):
        tracker.log(ROW | {"score/mean": float(step)}, step)
    tracker.close()
    tracker = kind(run_in(folder, step=2, **options))
    for step in range(3, 6):
        tracker.log(ROW | {"score/mean": float(step)}, step)
    tracker.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted(TensorBoardTracker, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("score/mean")] == [(step, float(step)) for step in range(1, 6)]
    tags = events.Tags()
    assert tags["histograms"] == ["array"]
    text = events.Tensors("completions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[2] == "| a &lt;b&gt; | 0.5 |"
    plugins = events.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert b"learning_rate" in plugins.content and plugins.plugin_name == "hparams"
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == []  # no second run of hparams


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        tracker = WandbTracker(run_in(tmp_path / "run", tags=["a"]))
        assert (tracker.client.project, tracker.client.name, tracker.client.tags) == ("reviews", "first", ("a",))
        assert tracker.client.config["learning_rate"] == 1e-5
        tracker.log(ROW, 1)
        tracker.close()
        assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": tracker.client.id}
        again = WandbTracker(run_in(tmp_path / "run", step=1))
        assert again.client.id == tracker.client.id
        again.close()
        assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{again.client.id}"))
        with wandb.init(project="own", dir=str(tmp_path)) as own:
            borrowed = WandbTracker(run_in(tmp_path / "other"))
            borrowed.close()
            assert borrowed.client is own and wandb.run is own  # not finished: the script started it
            assert not (tmp_path / "other" / "trackers.json").exists()
    finally:
        wandb.teardown()  # waits until the files are written
    records = [path.read_bytes() for path in (tmp_path / "run" / "wandb").rglob("run-*.wandb")]
    assert len(records) == 2 and any(b"score/mean" in record and b"learning_rate" in record for record in records)


class FakeWandbRun:
    def __init__(self, run_id: str, step: int) -> None:
        self.id, self.step = run_id, step
        self.logged: list[tuple[int, Any]] = []
        self.config = SimpleNamespace(update=lambda values, **_: None)

    def log(self, row: Any, step: int) -> None:
        self.logged.append((step, row["score/mean"]))

    def finish(self) -> None:
        pass


def test_a_resumed_wandb_run_gets_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    runs: dict[str, FakeWandbRun] = {}

    def init(**options: Any) -> FakeWandbRun:
        started.append(options)
        run = runs.setdefault(options["id"], FakeWandbRun(options["id"], 0))
        run.step = max((step for step, _ in run.logged), default=-1) + 1
        return run

    fake = SimpleNamespace(run=None, init=init, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    interrupted(WandbTracker, tmp_path / "run")
    (run,) = runs.values()
    assert run.logged == [(step, float(step)) for step in range(1, 6)]
    assert [options["resume"] for options in started] == ["allow", "allow"]
    assert started[0]["dir"] == str(tmp_path / "run")


@pytest.fixture
def trackio_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """trackio reads the folder of its database while it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("trackio")
    return tmp_path / "trackio"


def test_trackio_gets_each_step_once(tmp_path: Path, trackio_folder: Path) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    interrupted(TrackioTracker, tmp_path / "run", auto_log_cpu=False)
    name = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    assert name.startswith("first-")
    rows = SQLiteStorage.get_logs("reviews", name)
    assert [(row["step"], row["score/mean"]) for row in rows] == [(step, float(step)) for step in range(1, 6)]
    assert list(trackio_folder.glob("*.db"))
    assert rows[0]["completions"]["_value"] == [{"prompt": "a <b>", "score": 0.5}]


@pytest.mark.filterwarnings("ignore")  # mlflow's own
def test_mlflow_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    interrupted(MlflowTracker, tmp_path / "run", tracking_uri=uri)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    history = client.get_metric_history(run_id, "score/mean")
    assert [(m.step, m.value) for m in history] == [(step, float(step)) for step in range(1, 6)]
    record = client.get_run(run_id)
    assert record.info.run_name == "first" and record.info.status == "FINISHED"
    assert record.data.params == {"learning_rate": "1e-05", "train/steps": "4", "key": "[redacted]"}
    assert len(client.list_artifacts(run_id, "completions")) == 5


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(TypeError, match="flush_sec"):
        TensorBoardTracker(run_in(tmp_path / "run", flush_sec=3))


class Of:
    """A tracker of accelerate's."""

    tracker = "client"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self) -> None:
        self.told.append("started")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


def test_a_tracker_of_accelerate() -> None:
    theirs = Of()
    adapted = AccelerateTracker(theirs, {"a": 1})
    adapted.log({"x": 2.0, "completions": TABLE}, 3)
    adapted.close()
    assert theirs.told == ["started", {"a": 1}, (3, {"x": 2.0}), "finished"]
    assert adapted.client == "client"


def test_ids_of_several_trackers_are_kept(tmp_path: Path) -> None:
    for name in "abcdefgh":
        assert TrackerIds(tmp_path).get(name) is None
    threads = [threading.Thread(target=TrackerIds(tmp_path).set, args=(name, name * 2)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [TrackerIds(tmp_path).get(name) for name in "abcdefgh"] == [name * 2 for name in "abcdefgh"]
    TrackerIds(None).set("a", "b")
    assert TrackerIds(None).get("a") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": 3}', "\xff"])
def test_a_damaged_file_of_ids_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"trackers\.json is not a mapping .* delete it"):
        TrackerIds(tmp_path).get("wandb")


def test_a_tracker_starts_on_the_thread_of_its_first_row() -> None:
    made: list[Any] = []

    class Listening:
        def __init__(self) -> None:
            made.append(threading.current_thread())
            self.rows: list[Any] = []

        def log(self, row: Any, step: int) -> None:
            self.rows.append((step, row))

        def close(self) -> None:
            self.rows.append("closed")

    late = Late(Listening)
    assert late.client is None and not made
    with SafeTracker(late) as safe:
        safe.log({}, 0)  # only starts it
        assert late.ready.wait(10)
        safe.log({"a": 1}, 1)
    assert late.client.rows == [(1, {"a": 1}), "closed"]
    assert made == [safe._thread]


def test_a_start_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def start() -> Any:
        tries.append(1)
        raise ConnectionError("no server")

    late = Late(start)
    with SafeTracker(late, name="wall") as safe:
        for step in range(3):
            safe.log({"a": 1}, step)
    assert (len(tries), safe.failures, late.client) == (1, 3, None)
    assert "tracker wall failed" in caplog.text and "no server" in caplog.text


def test_every_adapter_has_a_name() -> None:
    assert set(ADAPTERS) == {"tensorboard", "wandb", "trackio", "mlflow"}
