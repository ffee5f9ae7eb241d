"""An offline stage in a run directory: the files of PPO's runs, and resuming to the bit, rows included."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from tests.helpers import tiny_llama, tiny_tokenizer
from tests.trainer.offline.data import quiet, texts
from tests.trainer.offline.preferences import ROWS
from tests.trainer.offline.test_reward_trainer import classifier
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.cli.run_table import read_run
from trl.report import write_report
from trl.trackers import RunDirectory, RunLocked, read_metrics, without_times

PAIRS = [dict(row) for row in [*ROWS, *ROWS[::-1], *ROWS, *ROWS[:2]]]  # 11
LABELLED = [
    {"prompt": row["prompt"], "completion": row[("chosen", "rejected")[i % 2]], "label": i % 2 == 0}
    for i, row in enumerate(PAIRS)
]
CLASSES = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
}
WATCHED = {
    "sft": ("mean_token_accuracy", "entropy", "num_tokens"),
    "reward": ("accuracy", "margin", "mean_reward"),
    "dpo": ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/rejected"),
    "kto": ("rewards/margins", "logps/chosen", "kl"),
}


class At(TrainerCallback):
    """Something that happens after an optimizer step."""

    def __init__(self, step: int, event: Any) -> None:
        self.step, self.event = step, event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and isinstance(self.event, int):
            signal.raise_signal(self.event)
        elif state.global_step == self.step:
            raise self.event


def trainer_of(stage: str, folder: Path, *callbacks: Any, rows: Any = None, **settings: Any) -> Any:
    """Four steps an epoch; rows of two steps, checkpoints of three, so that most of them cut a row in two."""
    kind, config = CLASSES[stage]
    usual = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 3, "seed": 3}
    usual |= {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "learning_rate": 1e-2, "bf16": False}
    args = config(str(folder / "unused"), **quiet(**usual | settings))
    data = {"sft": texts(11), "kto": LABELLED}.get(stage, PAIRS) if rows is None else rows
    model = classifier() if stage == "reward" else tiny_llama(attention_dropout=0.1)
    return kind(
        model,
        args=args,
        train_dataset=data,
        eval_dataset=data[:4],
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [without_times(row) for row in read_metrics(run)]


class Whole:
    """A run that nothing disturbs, by stage; made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trainers = folder, {}

    def __call__(self, stage: str) -> tuple[Path, Any]:
        if stage not in self.trainers:
            self.trainers[stage] = trainer_of(stage, self.folder)
            self.trainers[stage].train(run_dir=self.folder / stage)
        return self.folder / stage, self.trainers[stage]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stage", CLASSES)
def test_a_run_has_the_files_of_a_ppo_run(stage: str, whole: Whole) -> None:
    run, trainer = whole(stage)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "completions", "config.resolved.yaml", "environment.json", "events.log", "metrics.jsonl",
        "model", "summary.json",
    ]  # fmt: skip
    assert not any((whole.folder / "unused").iterdir())
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    logged: dict[int, dict[str, Any]] = {}
    for row in trainer.state.log_history:
        if "train_loss" not in row:
            logged[row["step"]] = logged.get(row["step"], {}) | row
    for row in rows:
        expected = {
            key: value for key, value in logged[row["step"]].items() if not key.endswith(("_second", "runtime"))
        }
        assert without_times(row) == expected
        assert {"time/step", "memory/peak_mb", "time/train_tokens_per_second"} <= row.keys()
    assert set(WATCHED[stage]) <= rows[0].keys() and "eval_loss" in rows[1] and "time/eval_runtime" in rows[1]
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    assert config["algorithm"] == {"name": stage, "offline": True} and config["train"] == {"steps": 8}
    assert config[stage]["learning_rate"] == 1e-2 and config[stage]["lr_scheduler_type"] == "linear"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["reason"], summary["steps"], summary["target"]) == ("steps", 8, 8)
    assert summary["metrics"] == without_times(rows[-1])
    assert json.loads((run / "checkpoints" / "latest.json").read_text()) == {"checkpoint": "checkpoint-8", "step": 8}
    assert not list(run.rglob("training_args.bin"))  # S1, S9
    assert torch.equal(weights(trainer), weights_in(run / "model", stage))
    row = read_run(run)
    assert (row.algorithm, row.state, row.step, row.target) == (stage, "finished", 8, 8)
    assert row.loss == rows[-1]["eval_loss"] and row.model == str(run / "model")


def weights_in(folder: Path, stage: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    return torch.cat([parameter.detach().flatten() for parameter in auto.from_pretrained(folder).parameters()])


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        *((stage, 5) for stage in ("sft", "reward", "dpo")),
        *(pytest.param(*job, marks=pytest.mark.slow) for job in (("kto", 5), ("sft", 2))),
    ],
)
def test_a_run_that_broke_is_resumed_to_the_bit(
    stage: str, step: int, whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After step 2 there is no checkpoint yet; after step 5 one of step 3, in the middle of a row and of an epoch."""
    expected, trainer = whole(stage)
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power"):
        trainer_of(stage, tmp_path, At(step, RuntimeError("the power is gone"))).train(run_dir=run)
    assert read_run(run).state == "failed"
    resumed = trainer_of(stage, tmp_path)
    resumed.train(run_dir=run, resume_from_checkpoint="auto")
    assert rows_of(run) == rows_of(expected)
    assert torch.equal(weights(resumed), weights(trainer))
    assert resumed.state.global_step == 8 and "incomplete" not in caplog.text


@pytest.mark.parametrize("step", [7, pytest.param(4, marks=pytest.mark.slow)])
def test_a_signal_saves_the_step_and_going_on_ends_the_same(step: int, whole: Whole, tmp_path: Path) -> None:
    """At the end of an epoch, and in the middle of one, of a row, and between two checkpoints."""
    expected, trainer = whole("sft")
    run = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer_of("sft", tmp_path, At(step, signal.SIGINT)).train(run_dir=run)
    assert signal.getsignal(signal.SIGINT) is handler
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["reason"], summary["steps"]) == ("SIGINT", step) and not (run / "model").exists()
    assert json.loads((run / "checkpoints" / "latest.json").read_text())["step"] == step
    assert read_run(run).state == "stopped"
    resumed = trainer_of("sft", tmp_path)
    resumed.train(run_dir=run, resume_from_checkpoint=True)
    assert rows_of(run) == rows_of(expected) and torch.equal(weights(resumed), weights(trainer))


def test_sigterm_ends_with_its_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        trainer_of("dpo", tmp_path, At(1, signal.SIGTERM)).train(run_dir=tmp_path / "run")
    assert ended.value.code == 143


def test_a_finished_run_takes_no_further_step_and_may_be_trained_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer_of("sft", tmp_path, max_steps=3).train(run_dir=run)
    before = rows_of(run)
    again = trainer_of("sft", tmp_path, max_steps=3)
    assert again.train(run_dir=run, resume_from_checkpoint="auto").global_step == 3
    assert rows_of(run) == before and json.loads((run / "summary.json").read_text())["steps"] == 3
    trainer_of("sft", tmp_path, max_steps=5).train(run_dir=run, resume_from_checkpoint="auto")
    assert [row["step"] for row in rows_of(run)] == [2, 3, 4, 5]  # 3 and 5: the evaluations at the end
    assert "setting changed: sft.max_steps: 3 -> 5" in (run / "events.log").read_text()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = trainer_of("sft", tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True, but .* contains no run"):
        trainer.train(run_dir=run, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a run goes on from a checkpoint of its own"):
        trainer.train("somewhere/checkpoint-3", run_dir=run)
    with pytest.raises(ValueError, match="progress and launch are for a run"):
        trainer.train(progress=False)
    with pytest.raises(ValueError, match="save_only_model=True"):
        trainer_of("sft", tmp_path, save_only_model=True).train(run_dir=run)
    trainer.train(run_dir=run)
    with pytest.raises(ValueError, match="already contains a run: pass resume_from_checkpoint='auto'"):
        trainer_of("sft", tmp_path).train(run_dir=run)
    with pytest.raises(ValueError, match=r"rows of the training data: 11 then, 9 now.*seed: 3 then, 4 now"):
        trainer_of("sft", tmp_path, rows=texts(9), seed=4).train(run_dir=run, resume_from_checkpoint="auto")
    with RunDirectory.open(run), pytest.raises(RunLocked):
        trainer_of("sft", tmp_path).train(run_dir=run, resume_from_checkpoint="auto")


@pytest.mark.slow
def test_an_evaluation_before_the_first_step_is_row_0(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError):
        trainer_of("sft", tmp_path, At(5, RuntimeError("gone")), eval_on_start=True).train(run_dir=run)
    assert [row["step"] for row in rows_of(run)][:2] == [0, 2] and "eval_loss" in rows_of(run)[0]
    trainer_of("sft", tmp_path, eval_on_start=True).train(run_dir=run, resume_from_checkpoint="auto")
    assert [row["step"] for row in rows_of(run)] == [0, 2, 4, 6, 8]


def test_a_trainer_without_a_run_directory_is_as_before(tmp_path: Path) -> None:
    trainer = trainer_of("sft", tmp_path, max_steps=3)
    trainer.train(run_dir=tmp_path / "run")
    other = trainer_of("sft", tmp_path, max_steps=3)
    other.train()
    assert torch.equal(weights(trainer), weights(other))
    assert (tmp_path / "unused" / "checkpoint-3").is_dir()
    assert [type(callback) for callback in trainer.callback_handler.callbacks] == [
        type(callback) for callback in other.callback_handler.callbacks
    ]


def test_the_report_has_the_sections_of_its_stage_alone(whole: Whole, tmp_path: Path) -> None:
    page = write_report(whole("dpo")[0], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The loss fell from" in page and ">Finished</span>" in page and "Finished at step 8 of 8" in page
    assert "<h2>Preferences</h2>" in page and 'id="t-implicit-rewards"' in page and 'id="t-loss"' in page
    for absent in (
        'href="#completions"',
        "<h2>Reward</h2>",
        "<h2>Policy</h2>",
        "Where the time goes",
        "Healthy</span>",
    ):
        assert absent not in page
    assert 'tabindex="-1" hidden>' in page
