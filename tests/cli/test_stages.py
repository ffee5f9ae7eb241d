"""`trl sft`, `reward`, `dpo` and `kto`: from `config init` to a model, stopped and resumed, and mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from trl.cli import catalogue, configs, estimate, stages
from trl.cli.app import main
from trl.cli.resolve import Resolved, resolve
from trl.cli.stage_templates import example_rows
from trl.trackers import read_metrics, without_times

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--max-steps", "3")


def resolved(stage: str, *files: str, **environment: str) -> Resolved:
    return resolve(stage, files=files or (f"{stage}.yaml",), environment=environment)


@pytest.fixture
def example(request: pytest.FixtureRequest, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `trl config init STAGE` writes; the stage's name."""
    stage = getattr(request, "param", "sft")
    assert main(["config", "init", stage]) == 0
    assert f"next: trl {stage} {stage}.yaml" in capsys.readouterr().out
    return str(stage)


@pytest.mark.parametrize(
    "example",
    ["reward", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "dpo", "kto"))],
    indirect=True,
)
def test_from_init_to_a_model(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = example
    assert main(["config", "check", f"{stage}.yaml"]) == 0
    assert main([stage, f"{stage}.yaml", *QUICK, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    shown = yaml.safe_load(printed.partition("\n\n")[0].partition("\n")[2])
    section = shown[catalogue.STAGES[stage]]
    assert (section["max_steps"], section["eval_strategy"], section["save_total_limit"]) == (3, "epoch", 2)
    assert "# held-out rows" in printed and "# --max-steps" in printed and f"# {stage}.yaml:7" in printed
    assert "rows            20, " in printed and "the run         3 steps, 0.6 passes" in printed
    assert not Path("runs").exists()
    assert main([stage, f"{stage}.yaml", *QUICK]) == 0
    said = capsys.readouterr().err
    assert "finished: 3 steps in 0:" in said and f"  model    runs/{stage}/model" in said
    assert f"  trl report runs/{stage} --open" in said and f"{tmp_path}" not in said
    rows = read_metrics(tmp_path / "runs" / stage)
    assert [row["step"] for row in rows] == [1, 2, 3] and "eval_loss" in rows[-1]
    kept = yaml.safe_load((tmp_path / "runs" / stage / "config.resolved.yaml").read_text())
    assert kept["launch"]["command"] == stage and list(kept["launch"]["files"]) == [str(tmp_path / f"{stage}.jsonl")]
    assert set(kept["launch"]["settings"]) == set(catalogue.sections_of(stage))
    assert main(["runs"]) == 0
    assert f"runs/{stage}" in (listed := capsys.readouterr().out) and "finished  3/3" in listed
    assert main(["report", f"runs/{stage}"]) == 0
    capsys.readouterr()
    if stage == "reward":
        assert main(["generate", "runs/reward", "--prompt", "It"]) == 2
        assert "its model scores texts and writes none" in capsys.readouterr().err
    else:
        assert main(["generate", f"runs/{stage}", "--prompt", "It was", "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out.startswith("It was")
    assert main(["eval", f"runs/{stage}"]) == 2
    assert f"is a run of trl {stage}" in capsys.readouterr().err
    assert main(["doctor", f"{stage}.yaml"]) == 2
    assert f"trl {stage} --dry-run checks this one" in capsys.readouterr().err


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_and_resume_go_on_to_the_same_rows(
    example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sft", "sft.yaml", "--max-steps", "4", "--run-name", "whole"]) == 0
    prepare = stages.prepare

    def interrupted(*arguments: Any) -> Any:
        trainer, options = prepare(*arguments)
        trainer.add_callback(Interrupt())
        return trainer, options

    monkeypatch.setattr(stages, "prepare", interrupted)
    assert main(["sft", "sft.yaml", "--max-steps", "4"]) == 130
    said = capsys.readouterr().err
    assert "saved step 2; run `trl resume runs/sft` to go on" in said and "Traceback" not in said
    monkeypatch.setattr(stages, "prepare", prepare)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # the run folder is all that is needed
    run = tmp_path / "runs" / "sft"
    assert main(["resume", str(run)]) == 0
    assert "finished: 4 steps" in capsys.readouterr().err
    rows = [[without_times(row) for row in read_metrics(path)] for path in (run, run.with_name("whole"))]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert main(["resume", str(run)]) == 0
    assert "is finished: --max-steps or --num-train-epochs with a higher number" in capsys.readouterr().err
    assert main(["resume", "--max-steps", "5", "--learning-rate", "1e-5", str(run)]) == 0
    said = capsys.readouterr().err
    assert "changed: sft.max_steps: 4 -> 5 (--max-steps)" in said and "finished: 5 steps" in said
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]
    (tmp_path / "sft.jsonl").write_text((tmp_path / "sft.jsonl").read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert main(["resume", str(run), "--max-steps", "6"]) == 2
    assert "sft.jsonl has changed since the run began" in capsys.readouterr().err
    assert main(["resume", str(run), "--steps", "6"]) == 2
    assert "--steps is no setting: use sft.max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-step", "3"], "--max-step is no option of trl sft: did you mean --max-steps?"),
        (["--lr-scheduler-type", "cosin"], "sft.lr_scheduler_type: 'cosin' is not one of linear, cosine, "),
        (["--optim", "adamw_toch"], " others: did you mean adamw_torch?"),
        (["--max-length", "1"], "--max-length: sft.max_length=1 must be at least 2"),
        (["--data", "sft.jsnl.jsonl"], "there is no file sft.jsnl.jsonl: did you mean sft.jsonl?"),
        (["--held-out", "24"], "--held-out: data.held_out=24 leaves none of 24 rows"),
        (["--use-liger-kernel"], "use_liger_kernel=True is not supported"),
        (["--model", "nobody/nothing"], "'nobody/nothing' is neither a local folder"),
        (["--beta", "0.1"], "--beta is no option of trl sft"),
    ],
)
def test_mistakes_have_a_place(
    words: list[str], said: str, example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", "sft.yaml", *words]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_a_bad_row_is_shown_with_its_line(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path("sft.jsonl").read_text().splitlines()
    lines[6] = json.dumps({"prompt": 12, "completion": " good"})
    Path("sft.jsonl").write_text("\n".join(lines))
    for words in ([], ["--held-out", "0"], ["--dry-run"]):
        assert main(["sft", "sft.yaml", *words]) == 2
        assert "sft.jsonl:7 (row 6), column 'prompt', is 12 (int)" in capsys.readouterr().err
    assert main(["sft"]) == 2
    message = capsys.readouterr().err
    assert "model.name is missing" in message and "data.dataset is missing" in message and "reward" not in message


def test_one_file_serves_several_commands(example: str) -> None:
    """C3: sections of other commands are checked, and left out."""
    text = Path("sft.yaml").read_text()
    Path("all.yaml").write_text(text + "dpo: {beta: 0.3}\nppo: {batch_size: 4}\nreward: length-penalty\n")
    found = resolved("sft", "all.yaml", TRL_PPO__SEED="3", TRL_DPO__BETA="0.7", TRL_SFT__MAX_STEPS="8")
    assert found["sft.max_steps"] == 8 and found.sources["sft.max_steps"] == "environment TRL_SFT__MAX_STEPS"
    assert found["sft.learning_rate"] == 3e-4 and "ppo.batch_size" not in found.values
    dpo = resolved("dpo", "all.yaml", TRL_DPO__BETA="0.7")
    assert (dpo["dpo.beta"], dpo["data.held_out"], "sft.learning_rate" in dpo.values) == (0.7, 4, False)
    Path("wrong.yaml").write_text("dpo: {bta: 0.3}\n")
    with pytest.raises(Exception, match=r"dpo.bta is no setting: did you mean beta\?"):
        resolved("sft", "wrong.yaml")
    assert configs.command_of(["sft.yaml"]) == "sft" and configs.command_of(["all.yaml"]) == "ppo"


@pytest.mark.parametrize("example", ["sft", "reward", "dpo"], indirect=True)
def test_the_estimate_is_that_of_the_trainer(example: str) -> None:
    stage = example
    settings = stages.with_evaluation(resolved(stage, **{f"TRL_{catalogue.STAGES[stage].upper()}__MAX_LENGTH": "64"}))
    text = stages.estimate(settings)
    trainer, arguments = stages.prepare(stage, settings, None)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert f"parameters      {parameters:,}, of which {parameters:,} are trained" in text
    steps = len(trainer.get_train_dataloader()) * int(trainer.args.num_train_epochs)
    assert f"the run         {steps:,} steps, " in text
    assert estimate.size(16 * parameters) in text.replace("about ", "")
    assert arguments["progress"] is True and len(trainer.eval_dataset) == 4


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_packing_and_lora_in_the_estimate(example: str) -> None:
    pytest.importorskip("peft")
    settings = resolved("sft", TRL_SFT__PACKING="true", TRL_SFT__MAX_LENGTH="64", TRL_LORA__R="4")
    text = stages.estimate(settings)
    trainer, _ = stages.prepare("sft", settings, None)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"of which {trained:,} are trained" in text and f" in {len(trainer.train_dataset)} packed rows" in text


def test_the_reward_model_is_a_reward_of_ppo(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    import trl.assets
    from trl.cli import reward_sources

    base = trl.assets.path("tiny-gpt2-reviews")
    config = AutoConfig.from_pretrained(base, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "judge")
    assert reward_sources._single_output("judge", {}) == {"label": 0}
    assert reward_sources._single_output("judge", {"label": "LABEL_0"}) == {"label": "LABEL_0"}
    assert reward_sources._single_output("tiny-bert-sentiment", {}) == {}
    Path("c.yaml").write_text("reward: classifier:judge\n")
    reward_sources.build(resolve("ppo", files=["c.yaml"], environment={})).close()


def test_example_rows_are_as_many_for_every_stage() -> None:
    assert {len(example_rows(stage).splitlines()) for stage in catalogue.STAGES} == {24}


def test_suffixes_are_those_of_the_readers() -> None:
    from trl.cli import places
    from trl.data import readers

    assert places.SUFFIXES == readers.SUFFIXES


@pytest.mark.slow
def test_killed_on_the_command_line_and_resumed(example: str, tmp_path: Path) -> None:
    """As a user types it: a process that dies by SIGKILL, and `trl resume` in another."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trl.cli"]
    words = ["sft", "sft.yaml", "--save-steps", "2"]
    subprocess.run([*command, *words, "--run-name", "whole"], cwd=tmp_path, env=environment, check=True)
    process = subprocess.Popen([*command, *words], cwd=tmp_path, env=environment)
    latest = tmp_path / "runs" / "sft" / "checkpoints" / "latest.json"
    while not latest.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "resume", "runs/sft"], cwd=tmp_path, env=environment, check=True)
    runs = [tmp_path / "runs" / name for name in ("sft", "whole")]
    rows = [[without_times(row) for row in read_metrics(run)] for run in runs]
    assert rows[0] == rows[1] and len(rows[0]) == 15
    assert len({(run / "model" / "model.safetensors").read_bytes() for run in runs}) == 1
