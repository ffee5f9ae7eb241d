"""Inspects a reward function's signature to decide how to call it. Standard library only."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trl.rewards.failures import ColumnError

if TYPE_CHECKING:
    from trl.types import Sample

_STANDARD_ARGUMENTS = ("prompts", "completions", "prompt_ids", "completion_ids")
_ACCEPTED = "f(prompts, completions, **columns), f(prompts, completions, a_column) or f(samples)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The arguments a reward function takes."""

    samples: bool = False  # pass the list of samples as the only argument
    positional: int = 0  # leading positional arguments: 0, or 2 for prompts and completions
    named: tuple[str, ...] = ()  # those of prompts, completions, prompt_ids, completion_ids passed by keyword
    columns: tuple[str, ...] = ()  # dataset columns passed by keyword
    required: tuple[str, ...] = ()  # columns without a default
    every_column: bool = False  # takes **kwargs, so gets every column

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Binding:
        """Builds the binding from the signature of `function`.

        Raises:
            ValueError: if the function cannot be called as a reward.
        """
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as error:
            raise ValueError(f"the signature of reward {name!r} cannot be inspected; wrap it as {_ACCEPTED}") from error
        positional_parameters = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keyword_parameters = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if positional_parameters and positional_parameters[0].name == "samples":
            others = [p for p in parameters[1:] if p.default is p.empty]
            if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
                raise ValueError(f"reward {name!r} takes arguments besides samples; expected {_ACCEPTED}")
            return cls(samples=True)
        takes_args = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        positional = 0
        if "completions" not in [p.name for p in keyword_parameters]:
            positional = 2
            if len(positional_parameters) < 2 and not takes_args:
                raise ValueError(
                    f"reward {name!r} has the signature {inspect.signature(function)}; expected {_ACCEPTED}"
                )
            keyword_parameters = [p for p in keyword_parameters if p not in positional_parameters[:2]]
        elif positional_only := [p.name for p in positional_parameters if p.kind is p.POSITIONAL_ONLY]:
            raise ValueError(f"reward {name!r} takes {positional_only[0]!r} as positional-only; expected {_ACCEPTED}")
        columns = [p for p in keyword_parameters if p.name not in _STANDARD_ARGUMENTS]
        return cls(
            positional=positional,
            named=tuple(p.name for p in keyword_parameters if p.name in _STANDARD_ARGUMENTS),
            columns=tuple(p.name for p in columns),
            required=tuple(p.name for p in columns if p.default is p.empty),
            every_column=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    @property
    def reads_ids(self) -> bool:
        """Whether the function receives token ids."""
        return self.samples or "prompt_ids" in self.named or "completion_ids" in self.named

    def columns_to_pass(self, samples: Sequence[Sample], name: str) -> list[str]:
        """Returns the columns of `samples` to pass to the function, in order of first appearance.

        Raises:
            ColumnError: if a required column is missing.
        """
        available = list(dict.fromkeys(column for sample in samples for column in sample.columns))
        if missing := [column for column in self.required if column not in available]:
            raise ColumnError(
                f"reward {name!r} needs the column {missing[0]!r}; the prompts have {_quote_names(available)}"
            )
        if self.samples or self.every_column:
            return [column for column in available if self.samples or column not in _STANDARD_ARGUMENTS]
        return [column for column in available if column in self.columns]

    def arguments(self, samples: Sequence[Sample], columns: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """Returns a call's positional and keyword arguments; a sample that lacks one of `columns` gets None for it."""
        if self.samples:
            return [list(samples)], {}
        standard = {
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.completion for sample in samples],
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
        }
        named = {name: standard[name] for name in self.named}
        named |= {column: [sample.columns.get(column) for sample in samples] for column in columns}
        return [standard[name] for name in _STANDARD_ARGUMENTS[: self.positional]], named

    def to_json(self) -> dict[str, Any]:
        """Serializes the binding to send it over a pipe."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Binding:
        """Restores a binding received over a pipe."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**values)


def copy_samples(samples: Sequence[Sample], names: Collection[str] | None = None) -> list[Sample]:
    """Copies samples with deep-copied columns, so that a reward cannot modify the dataset.

    Args:
        samples: the samples to copy.
        names: columns to copy, dropping all others; None copies every column.

    Raises:
        ColumnError: if a value cannot be copied; the message names its column and the remedy.
    """
    memo: dict[int, Any] = {}  # objects shared between samples are copied once
    copies = []
    for sample in samples:
        columns = {}
        for name, value in sample.columns.items():
            if names is not None and name not in names:
                continue
            try:
                columns[name] = copy.deepcopy(value, memo)
            except Exception as error:  # a __deepcopy__ may raise anything
                raise ColumnError(
                    f"the column {name!r} holds a {type(value).__name__} that cannot be copied for the reward "
                    f"({type(error).__name__}: {error}): give its class a __deepcopy__ method (returning self if it is "
                    "immutable), or store a key in the column by which the reward can look the value up"
                ) from error
        copies.append(replace(sample, columns=columns))
    return copies


def with_every_column(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples with None in the columns they lack, so that any part of a batch is scored like the whole."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    return [replace(sample, columns={name: sample.columns.get(name) for name in names}) for sample in samples]


def call(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Calls a function and awaits the result if it is awaitable, even inside a running event loop."""
    result = function(*positional, **named)
    if not inspect.isawaitable(result):
        return result

    async def await_result() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(await_result())
    # Event loops do not nest, and notebooks already run one: use a loop on a separate thread.
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(asyncio.run(await_result()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def resolve(path: str) -> Callable[..., Any]:
    """Imports the function named by "module:function".

    Raises:
        ValueError: if `path` does not have this form, or names no callable.
    """
    module, colon, attribute = path.partition(":")
    if not (colon and module and attribute):
        raise ValueError(f"{path!r} is not a path to a reward; expected 'module:function'")
    target: Any = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{path!r} does not exist: the module {module} has no attribute {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{path!r} is of type {type(target).__name__}; expected a function")
    return target


def path_of(function: Callable[..., Any]) -> str:
    """Returns the "module:function" path by which another process can import `function`.

    Raises:
        ValueError: if it cannot be imported that way; the message gives the reason and the remedy.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    remedy = "define it at the top level of a module and pass it or its 'module:function', or use isolation='thread'"
    if not module or not name:
        raise ValueError(
            f"a {type(function).__name__} object cannot run with isolation='process': a worker process imports the "
            f"reward by name, and only functions have one; {remedy}"
        )
    if "<lambda>" in name or "<locals>" in name:
        reason = "a lambda" if "<lambda>" in name else "defined inside another function"
        raise ValueError(f"reward {name!r} is {reason}: a worker process cannot import it by name; {remedy}")
    if module == "__main__":
        raise ValueError(
            f"reward {name!r} is defined in the main script: a worker process would have to run the whole script to "
            f"import it; {remedy}"
        )
    try:
        resolves_to_function = resolve(f"{module}:{name}") is function
    except (ImportError, ValueError):
        resolves_to_function = False
    if not resolves_to_function:
        raise ValueError(f"{module}:{name} is not this reward: a worker process would import something else; {remedy}")
    return f"{module}:{name}"


def _quote_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) if names else "no columns besides the prompt"
