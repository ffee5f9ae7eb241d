"""What docs/rewards.md shows runs; what this package imports talks to nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trl.rewards
from tests.snippets import run_page, snippets

PAGE = Path(__file__).parents[2] / "docs/rewards.md"


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(snippets(PAGE)) >= 9
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run_page(PAGE, tmp_path)
    assert (tmp_path / "scores.jsonl").exists()


def test_every_public_name_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    inner = {"FunctionReward", "Guard", "RewardMix", "ScoreCache"}  # what as_reward makes and takes
    assert [name for name in trl.rewards.__all__ if name not in text and name not in inner] == []


def test_public_names_load() -> None:
    assert [name for name in trl.rewards.__all__ if getattr(trl.rewards, name) is None] == []
    assert set(trl.rewards.__all__) <= set(dir(trl.rewards))
    with pytest.raises(AttributeError, match="no attribute 'RewardMux'"):
        trl.rewards.RewardMux


def test_importing_and_scoring_open_no_socket() -> None:
    """S12, as far as rewards go."""
    script = """
import os, sys
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        os.write(2, f"{event} {arguments}".encode())
        os._exit(9)
sys.addaudithook(hook)
import trl.rewards
for name in trl.rewards.__all__:
    getattr(trl.rewards, name)
from tests.rewards.samples import samples
from tests.rewards import hostile
reward = trl.rewards.as_reward([hostile.length, trl.rewards.LengthPenalty(3)], cache=True)
print(reward.score(samples("one")).scores)
slow = trl.rewards.as_reward(hostile.length, isolation="process")
print(slow.score(samples("one")).scores)
slow.close()
trl.rewards.JudgeReward("https://host/v1", "m"), trl.rewards.RemoteReward("https://host/")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[3.0]\n[3.0]\n"
