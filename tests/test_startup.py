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


@pytest.mark.parametrize(
    ("load", "used", "said"),
    [(0.1, 2.0, None), (0.9, 2.0, None), (1.5, 0.1, None), (1.0, 1.0, "1.5 times"), (4.0, 2.0, "2.0 times")],
    ids=["idle", "nearly idle", "what was running has ended", "half of it", "all of it"],
)
def test_busy_is_what_others_use_now(
    load: float, used: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "cores", lambda: 2)
    monkeypatch.setattr(startup, "cores_in_use", lambda: used)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    note = startup.busy_note()
    assert (
        note is None
        if said is None
        else note is not None and said in note and f"use {used} of this machine's 2 cores" in note
    )


@pytest.mark.parametrize(
    ("threads", "busy", "variable", "said"),
    [
        (2, "busy", "PATH", True),
        (1, "busy", "PATH", False),
        (2, None, "PATH", False),
        (2, "busy", "OMP_WAIT_POLICY", False),
    ],
    ids=["spinning", "one thread", "idle", "the user has chosen"],
)
def test_spinning_threads_are_told_of_where_they_cost(
    threads: int,
    busy: str | None,
    variable: str,
    said: bool,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startup, "busy_note", lambda: busy)
    variables[variable] = "x"
    note = startup.spinning_note(threads)
    assert (note is not None and "OMP_WAIT_POLICY=passive" in note) == said


def test_cores_in_use_are_measured() -> None:
    assert 0 <= startup.cores_in_use(0.1) <= (os.cpu_count() or 1)


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= startup.cores() <= (os.cpu_count() or 1)
