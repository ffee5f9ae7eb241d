"""`trl`: reads the command, runs it, and turns errors into one screen and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from trl import startup
from trl.cli.arguments import read
from trl.cli.commands import COMMANDS, Command
from trl.cli.problems import UsageError, did_you_mean
from trl.redaction import redact
from trl.untrusted import visible

FAILED, INVALID, INTERRUPTED = 1, 2, 130  # exit codes; 0 is success, 143 SIGTERM
_TRACEBACK = "TRL_TRACEBACK"  # environment variable: 1 shows where an error was raised


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        arguments: words after `trl`; those of this process by default.

    Returns:
        0; 1 if the command failed; 2 if arguments or settings are invalid; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    startup.set_defaults()
    try:
        with warnings.catch_warnings():
            if arguments is None:
                warnings.showwarning = _show_warning
            return _run(words)
    except UsageError as error:
        name = f" {words[0]}" if words and words[0] in COMMANDS else ""
        _say(f"trl{name}: {error}")
        return INVALID
    except KeyboardInterrupt:
        startup.end_on_next_interrupt()
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `trl runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get(_TRACEBACK) or not _is_expected(error):
            raise
        _say(f"trl {words[0]}: {error}\n({type(error).__name__}; {_TRACEBACK}=1 shows where it was raised)")
        return FAILED


def _run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        from trl.cli import help_text

        print(help_text.overview() if len(words) < 2 else help_text.of_command(_command(words[1])))
        return 0
    if words[0] in ("--version", "-V"):
        from trl import __version__

        print(f"trl {__version__}")
        return 0
    command = _command(words[0])
    if "--help" in words[1:] or "-h" in words[1:]:
        from trl.cli import help_text

        print(help_text.of_command(command))
        return 0
    invocation = read(command, words[1:])
    module, _, function = command.function.partition(":")
    code: int = getattr(importlib.import_module(module), function)(invocation)
    return code


def _command(name: str) -> Command:
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        if name.endswith((".yaml", ".yml")):
            near = f": a configuration follows a command, as in trl ppo {name}"
        raise UsageError(f"{name} is no command{near or ': trl --help lists them'}")
    return COMMANDS[name]


def _is_expected(error: Exception) -> bool:
    """Whether an error is about input, files or the run, and not a defect of this program."""
    if isinstance(error, OSError | ImportError | ValueError):
        return True
    from trl.rewards.failures import RewardErrors, RewardFailed
    from trl.runs.spikes import SpikeError
    from trl.trackers import RunLocked

    if isinstance(error, RewardFailed | RewardErrors | SpikeError | RunLocked):
        return True
    # Errors of modules that import torch, which can be raised only if these are loaded.
    names = {
        "trl.runs.evaluation": "NothingScored",
        "trl.state.checkpoints": "CheckpointError",
        "trl.training.guards": "NonFiniteError",
    }
    kinds = [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]
    return isinstance(error, tuple(kinds))


def _say(text: str) -> None:
    sys.stderr.write(visible(redact(text)) + "\n")


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    sys.stderr.write(visible(f"warning: {message}") + "\n")
