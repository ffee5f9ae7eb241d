"""What a run keeps of its start: secrets never (S9), and everything that `resume` needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trl.cli import launch
from trl.cli.problems import UsageError
from trl.cli.resolve import Flag, Resolved, resolve
from trl.trackers import RunDirectory


def flags(**texts: str) -> list[Flag]:
    from trl.cli import catalogue

    return [
        Flag(setting=catalogue.settings()[k.replace("__", ".")], texts=(v,), spelling="--x") for k, v in texts.items()
    ]


def kept(folder: Path, resolved: Resolved, command: str = "ppo") -> Path:
    with RunDirectory.create(folder / "run") as run:
        run.write_config({"ppo": {}, "launch": launch.record(command, resolved, {})})
    return folder / "run"


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    before = resolve(
        "grpo",
        environment={"TRL_PPO__SEED": "3"},
        flags=flags(model__name="m", lora__r="4", lora__target_modules="q,v"),
    )
    found = launch.Launch(kept(tmp_path, before, "grpo"))
    after = found.resolved({}, ())
    assert found.command == "grpo" and dict(after.values) == dict(before.values)
    assert dict(after.sources) == dict(before.sources)
    changed = found.resolved({"TRL_PPO__LAM": "0.5"}, flags(ppo__seed="4"))
    assert launch.changes(before, changed) == [
        "ppo.lam: 0.95 -> 0.5 (environment TRL_PPO__LAM)",
        "ppo.seed: 3 -> 4 (--x)",
    ]


def test_a_secret_is_not_kept_and_is_asked_for(tmp_path: Path) -> None:
    run = kept(
        tmp_path, resolve("ppo", environment={}, flags=flags(ppo__tracker_kwargs="{wandb: {api_key: sekret-123456}}"))
    )
    for path in run.rglob("*"):
        assert path.is_dir() or b"sekret" not in path.read_bytes()
    with pytest.raises(UsageError, match=r"ppo.tracker_kwargs was a secret, which a run does not keep: give it again"):
        launch.Launch(run).resolved({}, ())
    again = launch.Launch(run).resolved({}, flags(ppo__tracker_kwargs="{wandb: {api_key: sekret-123456}}"))
    assert again["ppo.tracker_kwargs"] == {"wandb": {"api_key": "sekret-123456"}}


def test_a_default_stays_what_it_was_when_the_run_began(tmp_path: Path) -> None:
    run = kept(tmp_path, resolve("ppo", environment={}))
    path = run / launch.CONFIG
    stored = yaml.safe_load(path.read_text())
    stored["launch"]["settings"]["ppo"]["lam"] = 0.9  # of a version with another default
    path.write_text(yaml.safe_dump(stored))
    found = launch.Launch(run).resolved({}, ())
    assert found["ppo.lam"] == 0.9 and found.sources["ppo.lam"] == "default"
    assert found.section("ppo").lam == 0.9


def test_changes_show_no_secret(tmp_path: Path) -> None:
    """S9."""
    before, after = (
        resolve("ppo", environment={}, flags=flags(ppo__tracker_kwargs=f"{{wandb: {{api_key: {key}}}}}"))
        for key in ("sekret-123456", "sekret-654321")
    )
    (line,) = launch.changes(before, after)
    assert line.startswith("ppo.tracker_kwargs: {'wandb': {'api_key'") and "sekret" not in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ppo: {}\n", "started from Python"),
        ("", "started from Python"),
        ("[1", "started from Python"),
        ("launch: {settings: {ppo: {lerning_rate: 1}}}", "lerning_rate is no setting"),
    ],
)
def test_a_record_that_cannot_be_used(text: str, said: str, tmp_path: Path) -> None:
    run = kept(tmp_path, resolve("ppo", environment={}))
    (run / launch.CONFIG).write_text(text)
    with pytest.raises(UsageError, match=said):
        launch.Launch(run).resolved({}, ())


def test_nothing_in_a_stored_configuration_is_executed(tmp_path: Path) -> None:
    """S13."""
    run = kept(tmp_path, resolve("ppo", environment={}))
    (run / launch.CONFIG).write_text(f"launch: !!python/object/apply:os.system ['touch {tmp_path}/fired']\n")
    with pytest.raises(UsageError):
        launch.Launch(run).resolved({}, ())
    assert not (tmp_path / "fired").exists()
