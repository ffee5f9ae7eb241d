"""The environment that a run records, and how changes of it are listed."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
from pathlib import Path

import pytest
import torch

import trl
from trl.trackers.environment import differences, environment


def test_differences_name_the_path_and_both_values() -> None:
    before = {"python": "3.11", "packages": {"torch": "2.12", "peft": None}, "git": None, "gone": 1}
    now = {"python": "3.11", "packages": {"torch": "2.13", "peft": None, "new": "1"}, "git": {"commit": "a"}}
    assert differences(before, now) == [
        "packages.torch: 2.12 -> 2.13",
        "packages.new: None -> 1",
        "git: None -> {'commit': 'a'}",
        "gone: 1 -> None",
    ]
    assert differences(now, now) == [] == differences({}, {})


def test_versions_and_machine() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["trl"] == trl.__version__
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["machine"]["cores"] == os.cpu_count() and found["machine"]["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(found)) == found


def test_no_user_no_host_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "a-canary-in-the-environment")
    monkeypatch.setattr(socket, "gethostname", lambda: "a-canary-of-a-host")
    monkeypatch.setattr(getpass, "getuser", lambda: "a-canary-of-a-user")
    assert "canary" not in json.dumps(environment())


def test_outside_a_checkout_and_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] is None
