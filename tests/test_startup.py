"""What is set before torch is imported, and the word on a busy machine."""

from __future__ import annotations

import os

import pytest

from trl import startup


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {"PATH": "x"}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_threads_do_not_spin(variables: dict[str, str]) -> None:
    startup.set_defaults()
    assert variables["OMP_WAIT_POLICY"] == "passive"
    assert not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(variables)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_the_users_choice_stays(name: str, variables: dict[str, str]) -> None:
    variables[name] = "mine"
    startup.set_defaults()
    assert {key: variables.get(key) for key in startup.WAITING_CHOICES if key in variables} == {name: "mine"}


@pytest.mark.parametrize(("load", "said"), [(0.1, None), (0.9, None), (1.0, "1.5 times"), (4.0, "3.0 times")])
def test_busy_is_half_of_the_cores(load: float, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "cores", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    note = startup.busy_note()
    assert note is None if said is None else note is not None and said in note and f"load {load} on 2 cores" in note


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= startup.cores() <= (os.cpu_count() or 1)
