"""Joining the processes of a launch, without starting any."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from trl.models.loading import transformers_arguments
from trl.training import processes
from trl.training.processes import make_accelerator

LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    """An environment that no launcher has touched, and an accelerate that has seen nothing yet.

    Its patches are its own: what a test has patched is undone before accelerate's states are emptied.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHERS:
            patch.delenv(name, raising=False)
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        _forget()
        yield
        _forget()


def _forget() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def asked(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """What accelerate is asked for, by name."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def accelerator(**given: Any) -> Any:
        seen.update(given)
        raise Stop

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    with pytest.raises(Stop):
        make_accelerator(**settings)
    return seen


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_on_cpus_are_joined_whoever_started_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cpu" not in asked(monkeypatch)
    monkeypatch.setenv(name, "2")
    assert asked(monkeypatch, log_with=None) == {"cpu": True, "log_with": None}
    assert asked(monkeypatch, cpu=False) == {"cpu": False}


def test_apples_gpu_is_left_alone_for_want_of_float64(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert asked(monkeypatch)["cpu"] is True and "Apple's GPU has no float64" in caplog.text
    caplog.clear()
    assert asked(monkeypatch, cpu=False)["cpu"] is False and not caplog.text


def test_with_a_gpu_accelerate_is_asked_for_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert asked(monkeypatch) == {}


@pytest.mark.parametrize("gpu", [False, True])
def test_loading_a_quantised_model_does_not_keep_processes_apart(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks accelerate for its device before the trainer does, and who asks first decides."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    seen: list[bool] = []

    def state(cpu: bool = False) -> Any:
        seen.append(cpu)
        return SimpleNamespace(device="here")

    monkeypatch.setattr(accelerate, "PartialState", state)
    arguments = transformers_arguments({"quantization_config": object()})
    assert arguments["device_map"] == {"": "here"}
    assert seen == [not gpu]


@pytest.mark.parametrize("settings", [{}, {"cpu": True}, {"cpu": False}])
def test_53_processes_that_accelerate_sees_as_one_are_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    PartialState()  # as a script does that looks for its device before it makes the trainer
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes were started but accelerate sees only one"):
        make_accelerator(**settings)


def test_53_one_process_where_accelerate_was_asked_for_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of `accelerate launch --cpu --num_processes 2 script.py`."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator().num_processes == 1
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="asked for several processes but started only this one"):
        make_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "1")  # by torchrun, of one process
    assert make_accelerator().num_processes == 1


def test_47_accelerate_does_not_multiply_the_steps_of_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = make_accelerator()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step))
    monkeypatch.setitem(AcceleratorState._shared_state, "num_processes", 4)
    optimizer.step()
    scheduler.step()
    assert scheduler.scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == 0.5
