"""Rewards by their text in a configuration: `rewards.py:polite`, `classifier:MODEL`, `length-penalty` ...

A reward is code of the operator's choice: its name comes from configuration or flags, never from prompts or
checkpoints.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl.cli.places import place_of
from trl.cli.problems import Problem, UsageError, did_you_mean
from trl.cli.resolve import Resolved
from trl.cli.sections import RewardSettings

_BUILT_IN = ("classifier", "format", "length-penalty", "math", "remote")


def check(resolved: Resolved) -> dict[str, str]:
    """Checks what can be checked without running anything.

    Returns:
        SHA-256 of each file that holds a reward, by its absolute path.

    Raises:
        UsageError: if a source has no known form, its file is missing, or an option does not exist.
    """
    problems, digests = [], {}
    for name, source in resolved["reward.functions"].items():
        where = resolved.place(f"reward.functions.{name}")
        file, colon, function = source.rpartition(":")
        kind = source.partition(":")[0]
        if colon and file.endswith(".py"):
            path = Path(file)
            if not path.is_file():
                near = did_you_mean(
                    path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
                )
                problems.append(Problem(text=f"there is no file {file}{near}", where=where))
            elif not path.stem.isidentifier():
                problems.append(Problem(text=f"{path.name} cannot be imported: name it in letters and _", where=where))
            elif missing := _missing_function(path, function):
                problems.append(Problem(text=missing, where=where))
            else:
                digests[str(path.resolve())] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif kind in _BUILT_IN:
            problems += _check_options(resolved, name, kind)
            continue
        elif not (colon and file and function):
            near = did_you_mean(source, _BUILT_IN)
            expected = f"expected file.py:function, module:function, or one of {', '.join(_BUILT_IN)}"
            problems.append(Problem(text=f"{source!r} is no reward{near or ': ' + expected}", where=where))
        if resolved["reward.options"].get(name):
            place = resolved.place(f"reward.options.{name}")
            problems.append(Problem(text=f"{source} is a function and takes no options: give it defaults", where=place))
    if problems:
        raise UsageError(problems)
    return digests


def _missing_function(path: Path, function: str) -> str | None:
    """Why a file's text defines no such function; None if it does, or might while it is imported."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError):
        return None  # importing it says more
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {name for node in nodes if isinstance(node, ast.alias) for name in (node.name, node.asname) if name}
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    makes_names = names & {"*", "globals", "exec", "setattr", "vars"} or "__getattr__" in functions
    if makes_names or function.partition(".")[0].strip() in names.union(functions):
        return None
    return _no_function(path, function, functions)


def _no_function(where: Path | str, function: str, functions: Sequence[str]) -> str:
    near = did_you_mean(function, functions) or f": it has {', '.join(functions) or 'no functions'}"
    return f"{where} has no function {function}{near}"


def _check_options(resolved: Resolved, name: str, kind: str) -> list[Problem]:
    known = _options_of(kind)
    return [
        Problem(
            text=f"{kind} has no option {option}{did_you_mean(option, known) or ': it has ' + ', '.join(known)}",
            where=resolved.place(f"reward.options.{name}.{option}"),
        )
        for option in resolved["reward.options"].get(name, {})
        if option not in known
    ]


def _options_of(kind: str) -> list[str]:
    """Options of a built-in reward. Those of classifiers and services are listed, since their modules import torch."""
    if kind == "classifier":
        return [
            "label",
            "output",
            "batch_size",
            "max_length",
            "device",
            "allow_pickle",
            "revision",
            "trust_remote_code",
        ]
    if kind == "remote":
        return [
            "columns", "key_env", "rows_per_request", "concurrency", "timeout", "most_bytes", "retries", "schemes",
            "allow_link_local",
        ]  # fmt: skip
    if kind == "math":
        return []
    from trl.rewards.parts import FormatReward, LengthPenalty

    return list(inspect.signature(FormatReward if kind == "format" else LengthPenalty).parameters)


def build(resolved: Resolved, folder: str | None = None) -> Any:
    """The reward of a run.

    Args:
        resolved: settings that `check` has passed.
        folder: where to look for modules; the current folder by default.

    Raises:
        UsageError: if a function cannot be imported, or a setting does not fit.
    """
    from trl.rewards import as_reward

    settings: RewardSettings = resolved.section("reward")
    assert isinstance(settings.functions, dict) and isinstance(settings.weights, dict)
    parts = {
        name: _part(resolved, name, source, settings.options.get(name, {}), folder)
        for name, source in settings.functions.items()
    }
    arguments: dict[str, Any] = {
        "on_error": settings.on_error, "penalty": settings.penalty, "isolation": settings.isolation,
        "timeout": settings.timeout, "concurrency": settings.concurrency, "rows_per_call": settings.rows_per_call,
    }  # fmt: skip
    try:
        if len(parts) == 1 and not settings.weights:
            ((name, part),) = parts.items()
            return as_reward(part, name=None if hasattr(part, "score") else name, **arguments)
        weights = {name: settings.weights.get(name, 1.0) for name in parts}
        return as_reward(parts, weights=weights, missing=settings.missing, **arguments)
    except ValueError as error:
        raise UsageError([resolved.problem(str(error), "reward")]) from error


def check_columns(resolved: Resolved, columns: Collection[str]) -> None:
    """Imports the reward's functions and checks that the prompts have the columns that they need.

    Args:
        resolved: settings that `check` has passed.
        columns: columns of the prompts beside the prompt itself.

    Raises:
        UsageError: if a function cannot be imported, or needs a column that the prompts lack.
    """
    from trl.rewards.signature import Binding

    problems = []
    for name, source in resolved["reward.functions"].items():
        function = _part(resolved, name, source, {}, None) if source.partition(":")[0] not in _BUILT_IN else None
        if not inspect.isfunction(function):
            continue
        for column in Binding.of(function, name).required:
            if column not in columns:
                has = ", ".join(columns) or "none beside the prompt"
                text = f"reward {name} needs the column {column}{did_you_mean(column, columns)}; the prompts have {has}"
                problems.append(Problem(text=text, where=resolved.place("data.prompts")))
    if problems:
        raise UsageError(problems)


def _part(resolved: Resolved, name: str, source: str, options: Mapping[str, Any], folder: str | None) -> Any:
    kind, _, argument = source.partition(":")
    try:
        if kind not in _BUILT_IN:
            return _function(source, folder)
        if kind == "classifier":
            from trl.rewards import ClassifierReward

            return ClassifierReward.from_pretrained(place_of(argument), **_single_output(argument, options))
        if kind == "remote":
            from trl.rewards import RemoteReward

            return RemoteReward(argument, **options)
        from trl.rewards import FormatReward, LengthPenalty, math_reward

        if kind == "math":
            return math_reward
        return FormatReward(**options) if kind == "format" else LengthPenalty(**options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(
            [Problem(text=f"reward {name}: {error}", where=resolved.place(f"reward.functions.{name}"))]
        ) from error


def _single_output(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options of a classifier; a reward model's only output needs no label."""
    from trl.pretrained import load_config

    trusted = bool(options.get("trust_remote_code", False))
    config = load_config(place_of(name), revision=options.get("revision"), trust_remote_code=trusted)
    return {"label": 0, **options} if config.num_labels == 1 else options


def _function(source: str, folder: str | None) -> Callable[..., Any]:
    """Imports a function; a worker process can import it by the same name."""
    from trl.rewards.signature import resolve

    module, _, function = source.rpartition(":")
    file = Path(module).resolve() if module.endswith(".py") else None
    where = str(file.parent) if file is not None else folder or "."
    if where not in sys.path:
        sys.path.append(where)  # last: a file of the user's takes no library's place
    name = module if file is None else file.stem
    try:
        loaded = importlib.import_module(name)
    except Exception as error:  # the user's module may raise anything while it loads
        line = _line_in(file, error)
        raise ValueError(f"{source} cannot be imported: {type(error).__name__}: {error}{line}") from error
    found = Path(loaded.__file__ or "").resolve()
    if file is not None and found != file:
        raise ValueError(f"{file.name} has the name of another module, {found}: rename it")
    if not hasattr(loaded, function.partition(".")[0]):
        functions = [n for n, value in vars(loaded).items() if inspect.isfunction(value)]
        raise ValueError(_no_function(file or name, function, functions))
    return resolve(f"{name}:{function}")


def _line_in(file: Path | None, error: Exception) -> str:
    """Where in the user's file an error was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    trace, line = error.__traceback__, ""
    while trace is not None:
        if file is not None and trace.tb_frame.f_code.co_filename == str(file):
            line = f" ({file}:{trace.tb_lineno})"
        trace = trace.tb_next
    return line
