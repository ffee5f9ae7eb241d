"""A managed run that is stopped, resumed, starved and lied to. tests/faults does it to whole processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.managed import HELD_OUT, PROMPTS, bits, events, fresh, recorded, run, words
from tests.training.disks import Disk
from trl import CheckpointError, NonFiniteError, SpikeError, SpikeSettings, TrainCallback
from trl.algorithms.ppo import ppo_loss
from trl.rewards import as_reward
from trl.runs import keeper as keeper_module
from trl.runs.keeper import Keeper
from trl.runs.options import TrainOptions
from trl.runs.spikes import SpikeDetector
from trl.state.checkpoints import load_checkpoint
from trl.trackers import read_completions, read_ending, read_metrics
from trl.types import Loss


class StopAfter(TrainCallback):
    def __init__(self, step: int) -> None:
        self.last = step

    def on_step(self, trainer: Any, step: int, row: Any) -> bool:
        return step == self.last


def same_end(whole: Path, parts: Path, ends: list[Any]) -> None:
    assert recorded(whole) == recorded(parts)
    assert ends[0] == ends[1]


Uninterrupted = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """`uninterrupted(**arguments)`: folder and `bits` of a whole run; equal arguments share one run, which is read only."""
    runs: dict[str, tuple[Path, Any]] = {}

    def whole(**arguments: Any) -> tuple[Path, Any]:
        key = repr(sorted(arguments.items()))
        if key not in runs:
            folder, trainer = tmp_path_factory.mktemp("whole"), fresh()
            run(trainer, run_dir=folder, **arguments)
            runs[key] = folder, bits(trainer)
        return runs[key]

    return whole


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_ends_as_one_without_an_interruption(
    tmp_path: Path, uninterrupted: Uninterrupted, stop: int
) -> None:
    """Ten prompts in batches of four: in the first step of an epoch, over its end, and in the last step of the run."""
    arguments = dict(steps=5, eval_prompts=HELD_OUT, eval_every=2, save_every=2)
    whole, end = uninterrupted(**arguments)
    run(run_dir=tmp_path / "parts", callbacks=[StopAfter(stop)], **arguments)
    torch.manual_seed(1234)  # whatever is drawn in between is of another process
    trainer = fresh(chance=7)
    assert run(trainer, run_dir=tmp_path / "parts", resume=True, **arguments).steps == 5
    same_end(whole, tmp_path / "parts", [end, bits(trainer)])


def test_records_after_the_checkpoint_are_made_once(tmp_path: Path) -> None:
    """Killed in step 4, after the checkpoint of step 2: step 3 is in the records and is done again."""
    calls = []

    def dies(prompts: Any, completions: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the power is gone")
        return words(prompts, completions)

    with pytest.raises(RuntimeError, match="the power is gone"):
        run(reward=as_reward(dies, name="words"), run_dir=tmp_path / "parts", steps=4, save_every=2)
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [1, 2, 3]
    ends = []
    for name in ("parts", "whole"):
        trainer = fresh()
        run(trainer, run_dir=tmp_path / name, steps=4, save_every=2, resume="auto")
        ends.append(bits(trainer))
    same_end(tmp_path / "whole", tmp_path / "parts", ends)


def test_a_run_that_is_there_is_neither_overwritten_nor_taken_for_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"resume=True, but .* contains no run"):
        run(run_dir=folder, resume=True)
    run(run_dir=folder, steps=1)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.suffix != ".log")
    with pytest.raises(ValueError, match="already contains a run: pass resume='auto' to continue it"):
        run(run_dir=folder, steps=1)
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.suffix != ".log") == before
    with pytest.raises(ValueError, match="is a checkpoint of another run: its prompts have other ids or tokens"):
        run(run_dir=folder, resume="auto", prompts=PROMPTS[::-1])
    with pytest.raises(ValueError, match="another run: seed was 0, is 3, which changes the order of the prompts"):
        run(fresh(seed=3), run_dir=folder, resume="auto")
    assert [row["step"] for row in read_metrics(folder)] == [1]
    assert run(run_dir=folder, resume="auto", steps=2).steps == 2  # a longer run is the same run
    assert any("setting changed: train.steps: 1 -> 2" in line for line in events(folder))


def test_a_checkpoint_of_ones_own_loop_is_told_from_one_of_this(tmp_path: Path) -> None:
    from trl.trackers import RunDirectory

    RunDirectory.create(tmp_path / "run").close()
    trainer = fresh()
    trainer.save_checkpoint(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match=r"was not saved by `train` of this version"):
        run(run_dir=tmp_path / "run", resume="auto")


def test_the_last_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    quality = iter([0.0, 3.0, 1.0, 0.0, 0.0])

    def scored(prompts: Any, completions: Any) -> Any:
        return [next(quality)] * len(prompts)

    result = run(reward=scored, run_dir=tmp_path / "run", steps=5, save_every=1)
    assert saved(tmp_path / "run") == ["step-00000002", "step-00000004", "step-00000005"]
    assert result.best == tmp_path / "run/checkpoints/step-00000002"
    assert result.last == tmp_path / "run/checkpoints/step-00000005"
    quality = iter([0.0, 3.0, 1.0, 0.0, 0.0])
    result = run(reward=scored, run_dir=tmp_path / "other", steps=5, save_every=1, keep_best=False, keep_last=1)
    assert (saved(tmp_path / "other"), result.best) == (["step-00000005"], None)


def test_saves_by_the_clock_cost_less_than_a_hundredth_of_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of our own: a step takes 8 seconds, a save 5."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    save_whole, saves = keeper_module.save_training, []

    def slow(*arguments: Any, **options: Any) -> Any:
        now[0] += 5.0
        saves.append(now[0])
        return save_whole(*arguments, **options)

    monkeypatch.setattr(keeper_module, "save_training", slow)
    trainer = fresh()
    keeper = Keeper(trainer, TrainOptions(prompts=PROMPTS, reward=words, steps=450, run_dir=tmp_path / "run"), None)
    keeper.begin(0, None, {})
    for step in range(1, 451):
        now[0] += 8.0
        if keeper.due(step):
            keeper.save(step, {}, None)
    keeper.close()
    assert saves[0] < 70
    assert len(saves) >= 5 and 5.0 * len(saves) < 0.01 * now[0]


def test_the_best_evaluation_is_saved_where_the_clock_decides(tmp_path: Path) -> None:
    quality = iter(
        [99.0, 0.0, 1.0, 9.0, 4.0, 0.0, 2.0, 0.0, 3.0]
    )  # before training, a step, its evaluation, a step ...

    def scored(prompts: Any, completions: Any) -> Any:
        return [next(quality)] * len(prompts)

    result = run(reward=scored, run_dir=tmp_path / "run", steps=4, eval_prompts=HELD_OUT, eval_every=1)
    assert result.best == tmp_path / "run/checkpoints/step-00000002"
    assert saved(tmp_path / "run") == ["step-00000002", "step-00000004"]  # the last two, of which one is the best


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "error"), [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)])
def test_a_signal_ends_the_step_saves_and_leaves(
    tmp_path: Path, uninterrupted: Uninterrupted, name: str, error: type[BaseException]
) -> None:
    calls = []

    def interrupted(prompts: Any, completions: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.Signals[name])
        return words(prompts, completions)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(error) as raised:
        run(reward=as_reward(interrupted, name="words"), run_dir=tmp_path / "parts", steps=4, save_every=100)
    if error is SystemExit:
        assert raised.value.code == 143  # type: ignore[attr-defined]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert saved(tmp_path / "parts") == ["step-00000002"]
    assert events(tmp_path / "parts")[-1] == f"stopped by {name} after step 2 of 4"
    assert json.loads((tmp_path / "parts/summary.json").read_text())["reason"] == name
    trainer = fresh()
    run(trainer, run_dir=tmp_path / "parts", steps=4, save_every=100, resume="auto")
    whole, end = uninterrupted(steps=4, save_every=100)
    same_end(whole, tmp_path / "parts", [end, bits(trainer)])


def test_a_save_after_a_signal_that_the_disk_refuses_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    save = Keeper.save

    def refuses_once(self: Keeper, *arguments: Any) -> Path | None:
        if not refused:
            refused.append(1)
            return None
        return save(self, *arguments)

    def interrupted(prompts: Any, completions: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return words(prompts, completions)

    monkeypatch.setattr(Keeper, "save", refuses_once)
    with pytest.raises(SystemExit):
        run(
            reward=as_reward(interrupted, name="words"), run_dir=tmp_path, steps=4, save_every=100,
            on_disk_error="go_on",
        )  # fmt: skip
    assert refused and saved(tmp_path) == ["step-00000001"]


def test_a_second_interrupt_is_obeyed_at_once(tmp_path: Path) -> None:
    def interrupted(prompts: Any, completions: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(reward=interrupted, run_dir=tmp_path / "run")
    assert time.monotonic() - started < 30
    assert saved(tmp_path / "run") == []


def test_a_run_on_another_thread_leaves_signals_alone() -> None:
    results: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: results.append(run(steps=1)))
    thread.start()
    thread.join(60)
    assert results[0].steps == 1 and signal.getsignal(signal.SIGTERM) is before


# Updates that go wrong -----------------------------------------------------------------------------------------------


class Losses:
    """Spoils the losses of chosen microbatches; each step of these runs has four."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
        self.count, self.factors = 0, factors
        monkeypatch.setattr("trl.algorithms.ppo.ppo_loss", self.loss)

    def loss(self, policy: Any, settings: Any) -> Any:
        real = ppo_loss(policy, settings)

        def of(experience: Any) -> Any:
            self.count += 1
            found, factor = real(experience), self.factors.get(self.count, 1.0)
            metrics = dict(found.metrics)
            total = metrics["loss/total"]
            metrics["loss/total"] = type(total)(total.sum * factor, total.count)
            return Loss(objective=found.objective * factor, metrics=metrics, arrays=found.arrays)

        return of


def test_skipped_minibatches_of_one_step_do_not_overwrite_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a good one between them, each is the first in a row."""
    Losses(monkeypatch, {1: math.nan, 3: math.nan})
    with pytest.warns(UserWarning, match="the loss is not finite|gradient norm is nan"):
        run(fresh(), run_dir=tmp_path / "run", steps=2)
    assert len(list((tmp_path / "run/dumps").iterdir())) == 2


def test_a_minibatch_that_is_not_finite_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, {5: math.nan, 6: math.nan})
    trainer = fresh()
    with pytest.warns(UserWarning, match="the loss is not finite|gradient norm is nan"):
        run(trainer, run_dir=tmp_path / "run")
    assert [row["ppo/skipped_updates"] for row in read_metrics(tmp_path / "run")] == [0.0, 0.5, 0.0]
    files = sorted((tmp_path / "run/dumps").iterdir())
    assert [f.name for f in files] == [f"step-00000002-process-0-{n}.safetensors" for n in (1, 2)]
    dump = load_file(files[0])
    assert dump["tokens"].shape[0] == 2 and {"mask", "advantages", "old_logprobs", "scores"} <= set(dump)
    assert any("minibatch written to dumps/step-00000002" in line for line in events(tmp_path / "run"))
    assert trainer.guards.on_skip is None and trainer.config.max_skipped_updates is None  # as they were


def test_too_many_of_them_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, dict.fromkeys(range(5, 100), math.nan))
    warnings.simplefilter("ignore")  # of this test alone: pytest puts the filters back
    with pytest.raises(NonFiniteError, match="3 optimizer steps in a row"):
        run(run_dir=tmp_path / "run", save_every=1)
    assert saved(tmp_path / "run") == ["step-00000001"]
    assert "failed in step 2: NonFiniteError" in events(tmp_path / "run")[-1]


# Spikes --------------------------------------------------------------------------------------------------------------

LOSS_SPIKES = SpikeSettings(loss_above=50.0, kl=None, loss=None)
AT_STEP_3 = {9: 1e6}  # the first microbatch of step 3


def plain() -> Any:
    return fresh("plain sgd", max_grad_norm=0.1)


def test_the_first_steps_are_watched_as_well() -> None:
    """Ten times the largest value so far, and at least 10 nats; the rise of a healthy run is none."""
    detector = SpikeDetector(SpikeSettings())
    healthy = (0.0, 0.7, 1.7, 2.9, 5.1, 8.0, 8.4, 8.9, 12.9, 14.2)  # the demo's
    for kl in healthy:
        assert detector.spike("kl", kl) is None
        detector.remember("kl", kl)
    detector = SpikeDetector(SpikeSettings())
    assert detector.spike("kl", 97.0) is None  # a policy that was trained before
    detector.remember("kl", 0.0)
    assert detector.spike("kl", 9.9) is None
    assert detector.spike("kl", 238.0) == "the kl is 238, more than 10 times 1"
    for loss in (0.01, 2.0, 0.3):  # the first samples score
        assert detector.spike("loss", loss) is None
        detector.remember("loss", loss)
    assert detector.spike("loss", 19.0) is None
    assert detector.spike("loss", -21.0) == "the loss is 21, more than 10 times 2"
    assert SpikeDetector(SpikeSettings(kl=None)).spike("kl", 1e9) is None


def test_a_loss_spike_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Losses(monkeypatch, AT_STEP_3)
    run(plain(), run_dir=tmp_path / "run", steps=4, spike=LOSS_SPIKES)
    assert [line.split(":")[0] for line in events(tmp_path / "run") if "spike" in line] == ["spike in step 3"]
    assert "step 3: the loss is" in caplog.text
    assert [row["run/rollbacks"] for row in read_metrics(tmp_path / "run")] == [0, 0, 0, 0]


@pytest.mark.parametrize("folder", ["run", None])
def test_a_loss_spike_is_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None) -> None:
    """Step 3 spikes: the weights of step 2, the newest anchor, come back, and step 4 takes the next prompts."""
    where = None if folder is None else tmp_path / folder
    weights: dict[int, Any] = {}

    class Watch(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> None:
            weights[step] = bits(trainer)

    Losses(monkeypatch, AT_STEP_3)
    result = run(
        plain(), run_dir=where, steps=4, save_every=2, spike=LOSS_SPIKES, on_spike="rollback", callbacks=[Watch()]
    )
    assert weights[3]["tensors"] == weights[2]["tensors"] != weights[1]["tensors"]
    assert weights[3]["state"]["ppo"] == weights[2]["state"]["ppo"]
    assert weights[3]["state"]["generators"] != weights[2]["state"]["generators"]  # other samples from here on
    assert weights[4]["tensors"] != weights[3]["tensors"]
    assert result.metrics["run/rollbacks"] == 1
    if where is not None:
        taken = [s["prompt_id"] for step in range(1, 6) if step < 5 for s in read_completions(where, step)]
        assert len(set(taken[:10])) == 10  # no prompt came again
        assert any("rolled back to step 2; continuing with the next prompts" in line for line in events(where))


def test_a_run_that_rolls_back_is_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 3, whose checkpoint is no anchor: the spike in step 4 goes back to step 2 all the same."""
    arguments: dict[str, Any] = dict(
        steps=5, save_every=2, spike=LOSS_SPIKES, on_spike="rollback", keep_last=1, keep_best=False
    )
    ends = []
    Losses(monkeypatch, {13: 1e6})
    trainer = plain()
    run(trainer, run_dir=tmp_path / "whole", **arguments)
    ends.append(bits(trainer))
    Losses(monkeypatch, {13: 1e6})
    run(plain(), run_dir=tmp_path / "parts", callbacks=[StopAfter(3)], **arguments)
    assert {"step-00000002", "step-00000003"} <= set(saved(tmp_path / "parts"))
    Losses(monkeypatch, {1: 1e6})
    trainer = plain()
    run(trainer, run_dir=tmp_path / "parts", resume="auto", **arguments)
    ends.append(bits(trainer))
    same_end(tmp_path / "whole", tmp_path / "parts", ends)
    assert [row["run/rollbacks"] for row in read_metrics(tmp_path / "parts")] == [0, 0, 0, 1, 1]


def test_a_policy_that_was_given_up_rates_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 scores best, with a policy that its loss throws away: its checkpoint holds the weights of step 2 again."""
    scores = iter([1.0, 2.0, 3.0, 9.0, 4.0, 1.0])

    def scored(prompts: Any, completions: Any) -> list[float]:
        return [next(scores)] * len(prompts)

    Losses(monkeypatch, {13: 1e6})
    result = run(
        plain(), reward=scored, run_dir=tmp_path / "run", steps=6, save_every=2, spike=LOSS_SPIKES, on_spike="rollback"
    )
    assert [row["run/rollbacks"] for row in read_metrics(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]
    assert result.best == tmp_path / "run/checkpoints/step-00000002"


def test_spikes_without_an_end_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, dict.fromkeys(range(9, 100), 1e6))
    with pytest.raises(
        SpikeError, match=r"4 batches in a row spiked \(most_in_a_row=3\); the last because the loss is"
    ):
        run(plain(), run_dir=tmp_path / "run", steps=9, spike=LOSS_SPIKES, on_spike="rollback", save_every=2)
    assert len(read_metrics(tmp_path / "run")) == 5  # two good ones, three that were rolled back


def test_a_batch_whose_kl_spikes_is_skipped_before_it_changes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = plain()
    ends: dict[int, Any] = {}
    real = trainer._trl_evaluation

    class Watch(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> None:
            ends[step] = bits(trainer)

    def drifted(*arguments: Any) -> Any:
        def evaluate(rollout: Any) -> Any:
            evaluated = real(*arguments)(rollout)
            return replace(evaluated, ref_logprobs=evaluated.ref_logprobs - 100.0) if len(ends) == 2 else evaluated

        return evaluate

    monkeypatch.setattr(trainer, "_trl_evaluation", drifted)
    spike = SpikeSettings(kl=3.0, kl_floor=1.0, least=2, loss=None)
    run(trainer, run_dir=tmp_path / "run", steps=4, on_spike="skip", spike=spike, callbacks=[Watch()])
    rows = read_metrics(tmp_path / "run")
    assert [row["run/skipped_batches"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["objective/kl"] > 100 and "ppo/loss/total" not in rows[2] and "score/mean" in rows[2]
    assert ends[3]["tensors"] == ends[2]["tensors"] and ends[3]["state"]["ppo"] == ends[2]["state"]["ppo"]
    assert ends[4]["tensors"] != ends[3]["tensors"]
    samples = read_completions(tmp_path / "run", 3)
    assert all(s["kl"] > 90 and s["advantage"] is None for s in samples)
    assert any("the kl is" in line and "skipping the batch" in line for line in events(tmp_path / "run"))


@pytest.mark.parametrize(
    "wrong", [{"kl": 1.0}, {"loss": -1.0}, {"kl_above": 0.0}, {"kl_floor": None}, {"window": 0}, {"most_in_a_row": 1.5}]
)
def test_wrong_spike_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpikeSettings(**wrong)


# R7: another run, or the same one ------------------------------------------------------------------------------------


def refuses(folder: Path, trainer: Any, message: str, **arguments: Any) -> None:
    before, records = bits(trainer), recorded(folder)
    with pytest.raises(ValueError, match=rf"is a checkpoint of another run: {message}"):
        run(trainer, run_dir=folder, resume="auto", **arguments)
    assert bits(trainer) == before and recorded(folder) == records


def test_r7_another_run_is_refused_with_every_difference_named_and_nothing_changed(tmp_path: Path) -> None:
    run(run_dir=tmp_path, steps=1)
    refuses(tmp_path, fresh(batch_size=8), "batch_size was 4, is 8")
    refuses(tmp_path, fresh(seed=3), "seed was 0, is 3, which changes the order of the prompts")
    refuses(tmp_path, fresh(), "its prompts have other ids or tokens", prompts=PROMPTS[1:])
    several = "batch_size was 4, is 8; its prompts have other ids or tokens; seed was 0, is 3"
    refuses(tmp_path, fresh(batch_size=8, seed=3), several, prompts=PROMPTS[1:])


def test_an_attempt_to_resume_that_is_refused_is_no_failure_of_the_run(tmp_path: Path) -> None:
    run(run_dir=tmp_path, steps=2)
    (tmp_path / "summary.json").unlink()  # as after a kill
    refuses(tmp_path, fresh(batch_size=8), "batch_size was 4, is 8")
    assert events(tmp_path)[-1].startswith("could not begin: ") and read_ending(tmp_path).state == "killed"


def test_r7_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(run_dir=tmp_path, steps=1)
    checkpoint = load_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    other = replace(checkpoint, state=dict(checkpoint.state) | {"processes": 2})
    monkeypatch.setattr("trl.training.resume.load_checkpoint", lambda folder: other)
    refuses(tmp_path, fresh(), r"processes was 2, is 1\. To go on with that run")


def test_r7_other_settings_count_from_here_on_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(run_dir=tmp_path, steps=1)
    trainer = fresh(cliprange=0.3)
    run(trainer, run_dir=tmp_path, resume="auto", steps=2, generation={"max_new_tokens": 4})
    assert "settings have changed; the new values are used: cliprange was 0.2, is 0.3" in caplog.text
    assert {line for line in events(tmp_path) if line.startswith("setting changed")} == {
        "setting changed: ppo.cliprange: 0.2 -> 0.3",
        "setting changed: train.steps: 1 -> 2",
        "setting changed: train.generation.max_new_tokens: 5 -> 4",
    }
    assert max(sample["length"] for sample in read_completions(tmp_path, 2)) <= 4


def with_columns(answer: int = 0, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": text, "answer": {i + answer, "a", "b"}, **columns} for i, text in enumerate(PROMPTS)]


def test_r7_other_columns_and_held_out_prompts_count_from_here_on_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = {"prompts": with_columns(level=torch.tensor([0.5])), "eval_prompts": HELD_OUT, "eval_every": 1}
    run(run_dir=tmp_path, steps=1, **first)
    run(run_dir=tmp_path, steps=2, resume="auto", **(first | {"prompts": with_columns(level=torch.tensor([0.5]))}))
    assert not [line for line in events(tmp_path) if "have changed" in line]
    other = with_columns(answer=1, level=torch.tensor([0.5]), source=object())
    run(run_dir=tmp_path, steps=3, resume="auto", **(first | {"prompts": other}))
    said = "columns of the prompts have changed; the new data is used: answer, source"
    assert events(tmp_path).count(said) == 1 and said in caplog.text
    run(run_dir=tmp_path, steps=4, resume="auto", **(first | {"prompts": other, "eval_prompts": HELD_OUT[:2]}))
    said = "the held-out prompts have changed; the new data is used: ids and tokens"
    assert events(tmp_path).count(said) == 1 and said in caplog.text


def test_r7_a_run_that_begins_to_roll_back_goes_back_to_where_it_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plain(), run_dir=tmp_path, steps=2, save_every=2)
    Losses(monkeypatch, {5: 1e6})  # in step 4
    run(plain(), run_dir=tmp_path, steps=5, save_every=5, resume="auto", spike=LOSS_SPIKES, on_spike="rollback")
    assert any("rolled back to step 2; continuing with the next prompts" in line for line in events(tmp_path))


# What somebody has removed or broken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_records(tmp_path: Path, resume: Any) -> None:
    run(run_dir=tmp_path, steps=3, save_every=2)
    shutil.rmtree(tmp_path / "checkpoints")
    records, trainer = recorded(tmp_path), fresh()
    before = bits(trainer)
    for _ in range(2):  # the folder is made again; that changes nothing
        with pytest.raises(
            ValueError, match=r"records up to step 3 but no checkpoint .*the last one was of step 3: restore it"
        ):
            run(trainer, run_dir=tmp_path, resume=resume)
    assert recorded(tmp_path) == records and bits(trainer) == before
    assert (tmp_path / "summary.json").exists() and (tmp_path / "model").is_dir()


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again_if_asked(tmp_path: Path) -> None:
    def until_it_dies(prompts: Any, completions: Any) -> Any:
        if len(read_metrics(tmp_path / "parts")) == 2:
            raise ZeroDivisionError
        return words(prompts, completions)

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(reward=as_reward(until_it_dies, name="words"), run_dir=tmp_path / "parts", save_every=3)
    assert [row["step"] for row in read_metrics(tmp_path / "parts")] == [1, 2] and not saved(tmp_path / "parts")
    with pytest.raises(
        ValueError, match=r"up to step 2 but no checkpoint .*stopped before its first: resume='auto' would delete"
    ):
        run(run_dir=tmp_path / "parts", resume=True, save_every=3)
    ends = []
    for name in ("parts", "whole"):
        trainer = fresh()
        run(trainer, run_dir=tmp_path / name, resume="auto", save_every=3)
        ends.append(bits(trainer))
    same_end(tmp_path / "whole", tmp_path / "parts", ends)


def test_a_folder_of_completions_that_is_gone_costs_what_was_in_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(run_dir=tmp_path, steps=2)
    shutil.rmtree(tmp_path / "completions")
    run(run_dir=tmp_path, steps=3, resume=True)
    assert [path.stem for path in (tmp_path / "completions").iterdir()] == ["step-00000003"]
    said = "completions/ was deleted along with its contents; recreating it"
    assert said in events(tmp_path) and said in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_completions_removed_in_the_middle_of_a_run_do_not_end_it(tmp_path: Path) -> None:
    class Removes(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> None:
            if step == 1:
                shutil.rmtree(tmp_path / "completions")

    assert run(run_dir=tmp_path, steps=3, callbacks=[Removes()]).steps == 3
    assert len(list((tmp_path / "completions").iterdir())) == 2


def test_a_run_whose_whole_folder_is_removed_under_it_ends(tmp_path: Path) -> None:
    class Removes(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> None:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(FileNotFoundError, match=r"/run"):
        run(run_dir=tmp_path / "run", callbacks=[Removes()])


@pytest.mark.parametrize("text", ["a: [1\n", "\tppo: 1", "- a list\n", b"\xff\xfe"])
def test_settings_that_cannot_be_read_are_written_anew_and_that_is_said(
    tmp_path: Path, text: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run(run_dir=tmp_path, steps=1)
    settings = (tmp_path / "config.resolved.yaml").read_text()
    (tmp_path / "config.resolved.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "environment.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    run(run_dir=tmp_path, steps=1, resume=True)
    assert (tmp_path / "config.resolved.yaml").read_text() == settings
    for said in ("changes to them are unknown; the file is rewritten", "environment.json cannot be read"):
        assert any(said in line for line in events(tmp_path)) and said in caplog.text


# Disks ---------------------------------------------------------------------------------------------------------------


class Watching(Disk):
    """Notes which of the run's files a power cut would take at the moment in which a checkpoint gets its name."""

    def __init__(self) -> None:
        super().__init__()
        self.at_renames: list[list[str]] = []

    def _remember(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "replace" and Path(args[1]).parent.name == "checkpoints" and Path(args[1]).name.startswith("step-"):
            self.at_renames.append(sorted(path.name for path in self.unsynced))
        super()._remember(name, args, result)


def test_every_record_is_on_the_disk_before_the_checkpoint_that_relies_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Watching()
    for module in ("trl.files", "trl.trackers.run_directory"):
        monkeypatch.setattr(f"{module}.os", disk)
    run(run_dir=tmp_path, steps=3, save_every=1)
    assert disk.at_renames == [[], [], []]
    assert {"metrics.jsonl", "events.log"} <= {Path(where).name for name, where in disk.log if name == "write"}


class Refusing(Disk):
    """Refuses writes to files of a name, while it says so."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.refuses, self.refused = part, True, 0

    def _refuse(self, name: str, args: tuple[Any, ...]) -> None:
        path = str(self._paths[args[0]] if isinstance(args[0], int) else args[0])
        if self.refuses and name == "write" and self.part in path:
            self.refused += 1
            raise OSError(28, os.strerror(28))


def test_the_end_of_a_run_is_tried_more_than_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room again after two attempts; where it never has, the run fails."""

    class Twice(Refusing):
        def _refuse(self, name: str, args: tuple[Any, ...]) -> None:
            self.refuses = self.refused < 2
            super()._refuse(name, args)

    monkeypatch.setattr("trl.files.os", Twice("checkpoints"))
    run(run_dir=tmp_path / "run", steps=1, save_every=1, on_disk_error="go_on")
    assert saved(tmp_path / "run") == ["step-00000001"]
    monkeypatch.setattr("trl.files.os", Refusing("checkpoints"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(run_dir=tmp_path / "other", steps=1, on_disk_error="go_on")
    assert not (tmp_path / "other/summary.json").exists()


@pytest.mark.parametrize("part", ["metrics.jsonl", "completions", "checkpoints", "events.log"])
def test_a_full_disk_is_waited_for(
    tmp_path: Path,
    uninterrupted: Uninterrupted,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    part: str,
) -> None:
    arguments: dict[str, Any] = dict(steps=5, save_every=2, on_disk_error="go_on", keep_best=False)
    whole, end = uninterrupted(**arguments)
    disk, trainer = Refusing(part), fresh()
    disk.refuses = False
    monkeypatch.setattr("trl.files.os", disk)

    class Fill(TrainCallback):
        def on_step(self, trainer: Any, step: int, row: Any) -> None:
            disk.refuses = step in (1, 2)

    run(trainer, run_dir=tmp_path / "parts", callbacks=[Fill()], **arguments)
    assert disk.refused > 0
    same_end(whole, tmp_path / "parts", [end, bits(trainer)])
    summary = json.loads((tmp_path / "parts/summary.json").read_text())
    assert summary["run/disk_errors"] > 0
    assert "No space left on device" in caplog.text
    assert saved(tmp_path / "parts") == saved(whole) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize(("part", "error"), [("metrics.jsonl", OSError), ("checkpoints", CheckpointError)])
def test_a_full_disk_stops_the_run_and_what_was_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, error: type[Exception]
) -> None:
    run(run_dir=tmp_path / "run", steps=2, save_every=1)
    monkeypatch.setattr("trl.files.os", Refusing(part))
    with pytest.raises(error, match="No space left on device"):
        run(run_dir=tmp_path / "run", steps=4, save_every=1, resume="auto")
    monkeypatch.undo()
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None and checkpoint.step == 2
    assert run(run_dir=tmp_path / "run", steps=4, resume="auto").steps == 4


def test_what_a_killed_process_left_of_a_model_is_swept(tmp_path: Path) -> None:
    run(run_dir=tmp_path / "run", steps=1)
    for name in (".staging-final/model", "checkpoints/.staging-step-00000009-1"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "half").write_bytes(b"x")
    run(run_dir=tmp_path / "run", steps=1, resume="auto")
    assert not list((tmp_path / "run").rglob(".staging*"))


# Trackers ------------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_the_rows_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[Any] = []

    class Good:
        def log(self, row: Any, step: int) -> None:
            got.append((step, row["score/mean"]))

        def close(self) -> None:
            got.append("closed")

    class Dead(Good):
        def log(self, row: Any, step: int) -> None:
            raise ConnectionError("nobody there")

        def close(self) -> None:
            raise SystemExit(3)

    class Slow(Good):
        def log(self, row: Any, step: int) -> None:
            time.sleep(0.2)

    ends = []
    for name, trackers in (("without", []), ("with", [Good(), Dead(), Slow()])):
        trainer = fresh()
        result = run(trainer, run_dir=tmp_path / name, trackers=trackers)
        ends.append(bits(trainer))
    same_end(tmp_path / "without", tmp_path / "with", ends)
    rows = read_metrics(tmp_path / "with")
    assert got[:3] == [(row["step"], row["score/mean"]) for row in rows]
    assert "nobody there" in caplog.text and result.reason == "steps"


# Secrets and pickles -------------------------------------------------------------------------------------------------


def test_no_file_of_a_run_and_no_log_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "CANARY-9f8e7d6c5b"
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, canary)

    def leaks(prompts: Any, completions: Any, source: Any) -> Any:
        rows: list[Any] = words(prompts, completions)
        return [ConnectionError(f"https://user:{canary}@host refused key {canary}") if s == "bad" else r
                for s, r in zip(source, rows)]  # fmt: skip

    from trl.rewards import ErrorBudget

    reward = as_reward(leaks, on_error="skip", budget=ErrorBudget(share=0.9, window=100))
    prompts = [{"prompt": p, "source": "bad" if i % 3 == 0 else "good"} for i, p in enumerate(PROMPTS)]
    prompts[1]["prompt_id"], prompts[0]["prompt_id"] = canary, "a"
    for i in range(2, 10):
        prompts[i]["prompt_id"] = str(i)
    trainer = fresh(task_name=f"task {canary}", tracker_kwargs={"api_key": canary})
    Losses(monkeypatch, {5: math.nan})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(
            trainer, prompts, reward=reward, run_dir=tmp_path / "run", eval_prompts=[{"prompt": "w50", "source": "bad"}]
        )
        with pytest.raises(RuntimeError):
            run(
                trainer, prompts, reward=as_reward(leaks), run_dir=tmp_path / "run", steps=9, resume="auto",
                eval_prompts=[{"prompt": "w50", "source": "bad"}],
            )  # fmt: skip
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 15 and any(path.parent.name == "dumps" for path in files)
    assert [path for path in files if canary.encode() in path.read_bytes()] == []
    assert "refused key" in caplog.text and canary not in caplog.text
    assert any(sample["error"] and "[redacted]" in sample["error"] for sample in read_completions(tmp_path / "run", 1))


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("pickle")

    trainers = [fresh(), fresh()]
    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refused)
    run(trainers[0], run_dir=tmp_path / "run", steps=1)
    run(trainers[1], run_dir=tmp_path / "run", steps=2, resume="auto")
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
