"""What trackers are told of the settings, and that one that is not installed is not left out in silence."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType

from tests.helpers import tiny_gpt2
from trl import AutoModelForCausalLMWithValueHead, PPOConfig
from trl.trackers.clients import ADAPTERS
from trl.trackers.completions import Table
from trl.trainer.tracking import check_trackers, settings_to_track, tracker_names


class Own(GeneralTracker):
    """A tracker of the user's; `before` runs at its start and at every row."""

    name = "own"
    requires_logging_directory = False

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.told: list[Any] = []
        self._before = before

    @property
    def tracker(self) -> Any:
        return "the client"

    def start(self) -> None:
        self._before()
        self.told.append("started")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._before()
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


class Adapter:
    """Stands in for an adapter, and remembers every one that was made."""

    made: list[Any]

    def __init__(self, run: Any) -> None:
        self.run, self.rows = run, []
        run.ids.set("tensorboard", f"run {len(self.made)}")
        self.made.append(self)

    def log(self, row: Any, step: int) -> None:
        self.rows.append((step, row))

    def close(self) -> None:
        self.rows.append("closed")


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(Adapter, "made", [], raising=False)
    monkeypatch.setitem(ADAPTERS, "tensorboard", Adapter)
    monkeypatch.chdir(tmp_path)
    return Adapter.made


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.tracking.get_available_trackers", list)


@pytest.mark.parametrize(
    ("log_with", "package"),
    [
        ("wandb", "wandb"),
        ("trackio", "trackio"),
        ("comet_ml", "comet-ml"),
        (["dvclive"], "dvclive"),
        ("all", "tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(log_with: Any, package: str, nothing_installed: None) -> None:
    with pytest.raises(ImportError, match=rf"log_with=.*pip install {package}"):
        check_trackers(PPOConfig(log_with=log_with))


def test_nothing_is_started_before(
    make_trainer: Any, nothing_installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No process group, no random numbers, and no folder of another tracker."""
    monkeypatch.setattr("trl.trainer.construction.make_accelerator", None)
    folder = {"logging_dir": str(tmp_path / "logs")}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    before = torch.get_rng_state()
    with pytest.raises(ImportError, match="pip install wandb"):
        make_trainer(model=model, log_with="wandb", project_kwargs=folder, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tmp_path.iterdir())


def test_an_unknown_tracker(nothing_installed: None) -> None:
    with pytest.raises(ValueError, match=r"log_with='tensorbord' is not a tracker; did you mean 'tensorboard'\? All: "):
        check_trackers(PPOConfig(log_with="tensorbord"))
    with pytest.raises(ValueError, match=r"log_with='paper' is not a tracker; expected one of .*tensorboard"):
        check_trackers(PPOConfig(log_with="paper"))
    check_trackers(PPOConfig())


def test_a_name_is_all_that_an_installed_tracker_needs() -> None:
    pytest.importorskip("tensorboard")
    check_trackers(PPOConfig(log_with="tensorboard"))
    with pytest.raises(ValueError, match=r"run name '\.\./up' contains '\.\.'"):
        check_trackers(PPOConfig(log_with="tensorboard", tracker_project_name="../up"))


def test_wandb_without_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Refused(Exception):
        pass

    def login(**arguments: Any) -> None:
        asked.append(arguments)
        raise Refused("api_key not configured (no-tty)")

    errors = SimpleNamespace(Error=Refused)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None, login=login, errors=errors))
    monkeypatch.setattr("trl.trainer.tracking.get_available_trackers", lambda: ["wandb"])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"no API key: run `wandb login`, .* WANDB_MODE=offline \(api_key"):
        check_trackers(PPOConfig(log_with="wandb"))
    assert asked == [{"verify": False}]  # no request, which could hang
    check_trackers(PPOConfig(log_with="wandb", tracker_kwargs={"wandb": {"mode": "offline"}}))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(PPOConfig(log_with="wandb"))
    assert len(asked) == 1


def test_each_tracker_is_named_once() -> None:
    own = Own()
    assert tracker_names(["tensorboard", own, "tensorboard", LoggerType.WANDB]) == ["tensorboard", own, "wandb"]
    assert tracker_names(None) == [] and tracker_names("wandb") == ["wandb"]


def test_settings_are_numbers_and_texts() -> None:
    config = PPOConfig(
        batch_size=8,
        steps=24,
        tracker_kwargs={"wandb": {"name": "first", "api_key": "abc", "token": {"value": "abc"}, "tags": ["a"]}},
        push_to_hub_if_best_kwargs={"repo_id": "me/x", "token": "abc", "private": True},
    )
    told = settings_to_track(config)
    assert told["batch_size"] == 8 and told["total_ppo_epochs"] == 3 and told["learning_rate"] == 1e-5
    assert {name: value for name, value in told.items() if "/" in name} == {
        "tracker_kwargs/wandb/name": "first",
        "tracker_kwargs/wandb/api_key": "[redacted]",
        "tracker_kwargs/wandb/token": "[redacted]",
        "push_to_hub_if_best_kwargs/repo_id": "me/x",
        "push_to_hub_if_best_kwargs/token": "[redacted]",
        "push_to_hub_if_best_kwargs/private": True,
    }
    assert all(isinstance(value, int | float | str) for value in told.values())


def classic(trainer: Any, make_batch: Any, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """A loop of the user's own; returns the weights after each step."""
    weights = []
    for _ in range(steps):
        queries, responses, scores = make_batch()
        stats = trainer.step(queries, responses, scores)
        trainer.log_stats(stats, {"query": ["q"] * 4, "response": ["r"] * 4}, scores)
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    return weights


def test_a_classic_loop(make_trainer: Any, make_batch: Any, adapters: list[Any], tmp_path: Path) -> None:
    trainer = make_trainer(log_with="tensorboard", tracker_project_name="reviews", exp_name="first")
    assert adapters == [] and list(tmp_path.iterdir()) == []  # nothing starts before the first row
    classic(trainer, make_batch)
    trainer.accelerator.log({"mine": 1.0})  # belongs to the last step
    trainer.accelerator.end_training()
    (tracker,) = adapters
    assert [row if row == "closed" else row[0] for row in tracker.rows] == [1, 2, 2, "closed"]
    assert tracker.rows[2] == (2, {"mine": 1.0})
    scores = [float(score) for score in make_batch()[2]]
    assert tracker.rows[0][1]["game_log"] == Table(["query", "response", "reward"], [["q", "r", s] for s in scores])
    assert tracker.run.folder.parent == tmp_path / "runs/reviews" and tracker.run.folder.is_dir()
    assert (tracker.run.name, tracker.run.settings["batch_size"]) == ("first", 4)
    trainer.accelerator.log({"later": 1.0}, step=3)  # in a folder of its own, since the first is closed
    trainer.accelerator.end_training()
    assert adapters[1].run.folder != tracker.run.folder


def test_the_clients_own_object(make_trainer: Any) -> None:
    trainer = make_trainer(log_with=Own())
    assert trainer.accelerator.get_tracker("own", unwrap=True) == "the client"
    trainer.accelerator.end_training()


def test_a_logging_folder_that_is_given_wins(make_trainer: Any, adapters: list[Any], tmp_path: Path) -> None:
    trainer = make_trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path / "logs")})
    managed(trainer, tmp_path / "run", 1)
    assert adapters[0].run.folder == tmp_path / "logs" / "trl"


def managed(trainer: Any, folder: Path | None, steps: int, **arguments: Any) -> Any:
    return trainer.train(
        [f"w{number}" for number in range(5, 20)],
        reward=lambda prompts, completions: [float(len(text)) for text in completions],
        steps=steps,
        run_dir=folder,
        generation={"max_new_tokens": 4},
        progress=False,
        **arguments,
    )


def test_a_managed_run_and_its_resumption(make_trainer: Any, adapters: list[Any], tmp_path: Path) -> None:
    managed(make_trainer(log_with=["tensorboard"]), tmp_path / "first", 2)
    managed(make_trainer(log_with=["tensorboard"]), tmp_path / "first", 3, resume="auto")
    one, two = adapters
    assert one.run.folder == two.run.folder == tmp_path / "first" / "tensorboard"
    assert (one.run.step, two.run.step, one.run.name) == (0, 2, "first")
    assert one.run.settings["train/steps"] == 2 and one.run.settings["algorithm/name"] == "ppo"
    assert [row if row == "closed" else row[0] for row in one.rows] == [1, 2, "closed"]
    assert [row if row == "closed" else row[0] for row in two.rows] == [3, "closed"]
    assert two.run.ids.get("tensorboard") == "run 1"
    table = one.rows[0][1]["completions"]
    assert table.columns == ["prompt", "completion", "score", "kl", "length"] and len(table.rows) == 4


def test_tables_come_with_evaluations(make_trainer: Any, adapters: list[Any], tmp_path: Path) -> None:
    trainer = make_trainer(log_with="tensorboard")
    rows: list[Any] = []
    given = SimpleNamespace(log=lambda row, step: rows.append(row), close=lambda: None)
    managed(trainer, tmp_path / "run", 5, eval_prompts=["w5"], eval_every=2, trackers=[given])
    tables = [row[0] for row in adapters[0].rows if row != "closed" and "completions" in row[1]]
    assert tables == [2, 4, 5]
    assert len(rows) == 5 and not any("completions" in row for row in rows)  # numbers alone


def test_two_managed_runs_of_one_trainer(make_trainer: Any, adapters: list[Any], tmp_path: Path) -> None:
    trainer = make_trainer(log_with="tensorboard")
    managed(trainer, tmp_path / "a", 1)
    managed(trainer, tmp_path / "b", 1)
    managed(trainer, None, 1)
    assert [tracker.run.folder.parent for tracker in adapters[:2]] == [tmp_path / "a", tmp_path / "b"]
    assert adapters[2].run.folder.parent == tmp_path / "runs/trl"
    assert all(tracker.rows[-1] == "closed" for tracker in adapters)


def test_a_folder_that_cannot_be_written(
    make_trainer: Any,
    make_batch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    trainer = make_trainer(log_with="tensorboard")
    classic(trainer, make_batch)
    trainer.accelerator.end_training()
    assert "tracker tensorboard failed" in caplog.text and "NotADirectoryError" in caplog.text


@pytest.fixture(scope="module")
def untracked() -> dict[str, dict[str, torch.Tensor]]:
    """Weights at the end of each loop without a tracker, from the first test that needs them."""
    return {}


@pytest.mark.parametrize("loop", ["classic", "managed"])
@pytest.mark.parametrize("kind", ["dead", "full", "slow", "hanging"])
def test_r16_no_tracker_changes_a_weight_or_holds_up_a_loop(
    kind: str,
    loop: str,
    untracked: dict[str, dict[str, torch.Tensor]],
    make_trainer: Any,
    make_batch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = threading.Event()

    def fail(error: Exception) -> None:
        raise error

    before: dict[str, Callable[[], Any]] = {
        "dead": lambda: fail(ConnectionError("gone")),
        "full": lambda: fail(OSError(28, "No space left on device")),
        "slow": lambda: time.sleep(3),
        "hanging": lambda: free.wait(60),
    }
    monkeypatch.setattr("trl.trainer.tracking._CLOSE_SECONDS", 0.1)
    held = 0.0

    def weights(trainer: Any, folder: Path) -> dict[str, torch.Tensor]:
        nonlocal held
        log = trainer.accelerator.log

        def timed(*arguments: Any, **named: Any) -> None:
            nonlocal held
            started = time.perf_counter()
            log(*arguments, **named)
            held += time.perf_counter() - started

        trainer.accelerator.log = timed
        if loop == "managed":
            managed(trainer, folder, 3)
        else:
            classic(trainer, make_batch, 3)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    if loop not in untracked:
        untracked[loop] = weights(make_trainer(), tmp_path / "without")
    expected, held = untracked[loop], 0.0
    found = weights(make_trainer(log_with=Own(before[kind])), tmp_path / "with")
    free.set()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert held < 1.0  # the slow one alone would take 9 seconds
    assert "tracker own failed" in caplog.text or "tracker own did not finish" in caplog.text


def test_r16_rows_that_a_hanging_tracker_does_not_take_are_dropped(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trl.trainer.tracking._CLOSE_SECONDS", 0.1)
    free = threading.Event()
    trainer = make_trainer(log_with=Own(lambda: free.wait(60) and None))
    for step in range(300):
        trainer.accelerator.log({"a": 1.0}, step=step)
    assert "is behind by 256 rows: dropping rows" in caplog.text
    trainer.accelerator.end_training()
    free.set()


def test_other_processes_have_no_tracker(monkeypatch: pytest.MonkeyPatch, make_trainer: Any) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    own = Own()
    trainer = make_trainer(log_with=own)
    assert trainer.accelerator.trackers == [] and own.told == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_the_snippets_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/how-to/trackers.md").read_text(encoding="utf-8")
    first, own = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first, "trackers.md", "exec"), names)
    assert list(Path("runs/words/tensorboard").glob("events.out.tfevents*"))
    exec(compile(own, "trackers.md", "exec"), names)
    assert len([line for line in own.splitlines() if line]) <= 5
    managed(names["trainer"], None, 1, trackers=[names["Printed"]()])
    assert "step 1: score " in capsys.readouterr().out
