"""C6, exit codes, and errors of one screen without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl import __version__
from trl.cli.app import main
from trl.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "accelerate", "numpy", "yaml", "rich")


def loaded(code: str) -> set[str]:
    """Modules that a fresh interpreter loads for a piece of code."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('|'.join(set(sys.modules) - before))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return set(done.stdout.rsplit("\n", 2)[-2].split("|"))


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["nonsense"], ["runs", "--help"], ["generate", "--wrong"]]
)
def test_help_and_errors_load_nothing_heavy(words: list[str]) -> None:
    modules = loaded(f"from trl.cli.app import main\nmain({words!r})")
    assert modules & set(HEAVY) == set()
    assert len(modules) < 120  # 70 of the standard library, 20 of ours; torch alone has a thousand


def test_importing_trl_loads_nothing_heavy() -> None:
    modules = loaded("import trl")
    assert modules & set(HEAVY) == set() and len(modules) < 60


def test_settings_are_checked_without_torch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("ppo: {lerning_rate: 1}\n")
    for words in (["ppo", "c.yaml"], ["ppo", "--help"], ["config", "diff", "c.yaml", "c.yaml"], ["completion", "zsh"]):
        assert "torch" not in loaded(f"from trl.cli.app import main\nmain({words!r})")


@pytest.mark.bench
@pytest.mark.parametrize(("code", "limit"), [("-m trl.cli --help", 0.3), ("-c import\\ trl", 0.15)])
def test_seconds(code: str, limit: float) -> None:
    def seconds(words: list[str]) -> float:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        return time.perf_counter() - started

    words = [word.replace("\\", "") for word in code.replace("\\ ", "\0").split()]
    words = [word.replace("\0", " ") for word in words]
    best = min(seconds(words) for _ in range(7)) - min(seconds(["-c", "pass"]) for _ in range(7))
    print(f"{code}: {best:.3f} s more than an empty program")
    assert best < limit


def test_version_and_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl {__version__}\n"
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_function_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module, _, function = COMMANDS[name].function.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert main([name, "--help"]) == 0 == main(["help", name])
    printed = capsys.readouterr().out
    assert f"usage: trl {name} " in printed and COMMANDS[name].summary[1:] in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pppo"], "pppo is no command: did you mean ppo?"),
        (["run.yaml"], "a configuration follows a command, as in trl ppo run.yaml"),
        (["ppo"], "model.name is missing"),
        (["ppo", "missing.yaml"], "missing.yaml: there is no such file"),
        (["resume", "runs/x"], "there is no run"),
        (["runs", "nowhere"], "there is no folder nowhere"),
        (["completion", "bsh"], "bsh is none of bash, zsh, fish: did you mean bash?"),
        (["config", "chck"], "did you mean check?"),
    ],
)
def test_mistakes_are_one_screen_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message and len(message.splitlines()) < 20


def test_control_sequences_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """S8."""
    assert main(["\x1b[2Jppo\u202e"]) == 2
    assert main(["ppo", "--\x1b]0;title\x07seed", "1"]) == 2
    assert main(["ppo", "--model", "tiny-gpt2-review\x1b[31m"]) == 2
    message = capsys.readouterr().err
    assert "\x1b" not in message and "\x07" not in message and "\u202e" not in message


def test_secrets_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """S9: logs of a scheduler keep what is printed."""
    monkeypatch.setenv("SERVICE_TOKEN", "canary-12345678")
    assert main(["ppo", "--reward", "canary-12345678"]) == 2
    assert main(["ppo", "https://user:canary2@example.test/run.yaml"]) == 2
    message = capsys.readouterr().err
    assert "canary" not in message and "[redacted]" in message


def test_an_expected_error_is_a_line_and_a_defect_is_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import trl.cli.run_table as run_table
    from trl.trackers import RunLocked

    def fail(error: BaseException) -> None:
        def raise_(invocation: object) -> int:
            raise error

        monkeypatch.setattr(run_table, "main", raise_)

    for error in (OSError("disk"), ValueError("value"), RunLocked("locked")):
        fail(error)
        assert main(["runs"]) == 1
        assert str(error) in capsys.readouterr().err
    fail(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main(["runs"])
    fail(KeyboardInterrupt())
    assert main(["runs"]) == 130
    fail(ValueError("value"))
    monkeypatch.setenv("TRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="value"):
        main(["runs"])
