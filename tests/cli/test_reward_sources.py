"""Rewards by name: functions of files and modules, built-in ones, and what is refused. S13."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import REWARDS
from trl.cli import catalogue, places, reward_sources
from trl.cli.problems import UsageError
from trl.cli.resolve import Flag, resolve
from trl.types import Sample

SAMPLE = Sample(prompt="It was", completion=" good", prompt_ids=(1,), completion_ids=(2, 3), columns={})


def reward(*sources: str, **settings: str) -> Any:
    texts = {"reward.functions": sources} | {f"reward.{name}": (text,) for name, text in settings.items()}
    flags = [Flag(setting=catalogue.settings()[path], texts=text, spelling="--x") for path, text in texts.items()]
    resolved = resolve("ppo", environment={}, flags=flags)
    reward_sources.check(resolved)
    return reward_sources.build(places.with_absolute_paths(resolved))


def refused(*sources: str, **settings: str) -> str:
    with pytest.raises(UsageError) as raised:
        reward(*sources, **settings)
    return str(raised.value)


@pytest.mark.parametrize("folder", [".", "sub/folder"])
def test_a_function_in_a_file(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "rewards.py").write_text(REWARDS)
    scored = reward(f"{folder}/rewards.py:polite").score([SAMPLE])
    assert scored.scores == [1.05] and list(scored.components) == ["polite"]


def test_a_function_in_a_file_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(
        "import os\n\ndef pid(prompts, completions):\n    return [os.getpid() for _ in completions]\n"
    )
    built = reward("rewards.py:pid", isolation="process", timeout="60")
    try:
        import os

        assert built.score([SAMPLE]).scores[0] not in (None, os.getpid())
    finally:
        built.close()


def test_a_misspelled_function_is_found_without_importing_its_file(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("GOOD = 1\nraise SystemExit('imported')\n\ndef happy(completions): ...\n")
    assert refused("rewards.py:hapy").endswith("rewards.py has no function hapy: did you mean happy?")


@pytest.mark.parametrize(
    "text", ["from scores import *", "globals()['po' + 'lite'] = len", "from scores import nice as polite"]
)
def test_a_file_that_makes_its_functions_is_not_judged_by_its_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "scores.py").write_text(REWARDS.replace("polite", "nice") + REWARDS)
    (tmp_path / "dynamic.py").write_text(text)
    flag = Flag(setting=catalogue.settings()["reward.functions"], texts=("dynamic.py:polite",), spelling="--x")
    assert list(reward_sources.check(resolve("ppo", environment={}, flags=[flag]))) == [str(tmp_path / "dynamic.py")]


def test_a_function_in_a_module_of_the_folder_that_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scores.py").write_text(REWARDS)
    (tmp_path / "json.py").write_text("raise SystemExit('taken instead of the library')")
    assert reward("mine.scores:polite").score([SAMPLE]).scores == [1.05]
    assert sys.path[-1] != "" and str(tmp_path / "mine") not in sys.path


def test_built_in_rewards_with_options_and_weights() -> None:
    built = reward(
        "short=length-penalty",
        "format",
        options="{short: {longest: 1, per_unit: 0.25}, format: {pattern: good}}",
        weights="short=2",
    )
    scored = built.score([SAMPLE])
    assert scored.components == {"short": [-0.25], "format": [1.0]}  # two tokens, one too many
    assert scored.scores == [2 * -0.25 + 1.0]


def test_the_classifier_in_the_package() -> None:
    scored = reward("classifier:tiny-bert-sentiment", options="{tiny-bert-sentiment: {output: probability}}").score(
        [SAMPLE]
    )
    assert 0.5 < scored.scores[0] < 1


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.py:f", "there is no file missing.py"),
        ("reward.py:polite", "there is no file reward.py: did you mean rewards.py?"),
        ("rewards.py:polit", "has no function polit: did you mean polite?"),
        ("rewards.py:zzz", "has no function zzz: it has polite"),
        ("my-rewards.py:f", "cannot be imported: name it in letters and _"),
        ("broken.py:f", "ZeroDivisionError: division by zero"),
        ("syntax.py:f", "SyntaxError"),
        ("string.py:polite", "has the name of another module"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("length-penalti", "did you mean length-penalty?"),
        ("polite", "is no reward: expected file.py:function"),
        ("format", "pattern"),
        ("remote:ftp://x", "ftp"),
    ],
)
def test_refused(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "my-rewards.py").write_text(REWARDS)
    (tmp_path / "broken.py").write_text("f = 1\ny = f / 0\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "string.py").write_text(REWARDS)
    message = refused(source)
    assert said in message
    if source.startswith("broken"):
        assert f"{tmp_path / 'broken.py'}:2" in message


def test_options_are_checked() -> None:
    assert "did you mean longest?" in refused("length-penalty", options="{length-penalty: {longst: 3}}")
    assert "takes no options" in refused("trl.rewards:math_reward", options="{math_reward: {a: 3}}")
    assert "is no reward" in refused("length-penalty", options="{short: {longest: 3}}")


def test_settings_that_contradict_each_other() -> None:
    assert "reward.timeout=3 needs isolation" in refused("length-penalty", timeout="3")
    assert "penalty" in refused("length-penalty", penalty="1")


def test_known_options_are_those_of_the_classes() -> None:
    import inspect

    from trl.rewards import ClassifierReward, RemoteReward

    own = set(inspect.signature(ClassifierReward.from_pretrained).parameters) - {"name_or_folder", "model_options"}
    assert own <= set(reward_sources._options_of("classifier"))
    assert set(inspect.signature(RemoteReward).parameters) - {"url"} == set(reward_sources._options_of("remote"))
