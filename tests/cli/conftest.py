"""Each test in a folder of its own, without settings in the environment, and with modules imported anew."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl import startup


@pytest.fixture(autouse=True)
def own_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    for name in os.environ:
        if name.startswith("TRL_") and "__" in name:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(startup, "end_on_next_interrupt", lambda: None)  # pytest's own handler stays
    monkeypatch.setattr(startup, "set_defaults", lambda: None)
    forget_modules(tmp_path_factory.getbasetemp())
    yield tmp_path
    forget_modules(tmp_path_factory.getbasetemp())


def forget_modules(folder: Path) -> None:
    """Forgets the modules of a folder, so that another test's of the same name are imported."""
    for name, module in list(sys.modules.items()):
        if str(vars(module).get("__file__")).startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a finished run of two steps, runs/run. Do not change it."""
    from tests.cli.helpers import write_project
    from trl.cli.app import main

    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(startup, "set_defaults", lambda: None)
        assert main(["ppo", "run.yaml"]) == 0
    forget_modules(folder)
    return folder
