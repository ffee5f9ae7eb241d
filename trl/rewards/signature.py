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

_OWN = ("prompts", "completions", "prompt_ids", "completion_ids")
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
            raise ValueError(f"the signature of reward {name!r} cannot be read; wrap it in {_ACCEPTED}") from error
        plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if plain and plain[0].name == "samples":
            others = [p for p in parameters[1:] if p.default is p.empty]
            if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others):
                raise ValueError(f"reward {name!r} takes more than samples; expected {_ACCEPTED}")
            return cls(samples=True)
        star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        positional = 0
        if "completions" not in [p.name for p in by_name]:
            positional = 2
            if len(plain) < 2 and not star:
                raise ValueError(f"reward {name!r} takes {inspect.signature(function)}; expected {_ACCEPTED}")
            by_name = [p for p in by_name if p not in plain[:2]]
        elif stray := [p.name for p in plain if p.kind is p.POSITIONAL_ONLY]:
            raise ValueError(f"reward {name!r} takes {stray[0]!r} by position only; expected {_ACCEPTED}")
        columns = [p for p in by_name if p.name not in _OWN]
        return cls(
            positional=positional,
            named=tuple(p.name for p in by_name if p.name in _OWN),
            columns=tuple(p.name for p in columns),
            required=tuple(p.name for p in columns if p.default is p.empty),
            every_column=any(p.kind is p.VAR_KEYWORD for p in parameters),
        )

    @property
    def reads_ids(self) -> bool:
        """Whether the function receives token ids."""
        return self.samples or "prompt_ids" in self.named or "completion_ids" in self.named

    def wanted(self, samples: Sequence[Sample], name: str) -> list[str]:
        """Returns the columns of `samples` to pass to the function, in order of first appearance.

        Raises:
            ColumnError: if a required column is missing.
        """
        present = list(dict.fromkeys(column for sample in samples for column in sample.columns))
        if missing := [column for column in self.required if column not in present]:
            raise ColumnError(f"reward {name!r} needs the column {missing[0]!r}; the prompts have {_listed(present)}")
        if self.samples or self.every_column:
            return [column for column in present if self.samples or column not in _OWN]
        return [column for column in present if column in self.columns]

    def arguments(self, samples: Sequence[Sample], columns: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """Returns a call's positional and keyword arguments; a sample that lacks one of `columns` gets None for it."""
        if self.samples:
            return [list(samples)], {}
        own = {
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.completion for sample in samples],
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
        }
        named = {name: own[name] for name in self.named}
        named |= {column: [sample.columns.get(column) for sample in samples] for column in columns}
        return [own[name] for name in _OWN[: self.positional]], named

    def to_json(self) -> dict[str, Any]:
        """Serializes the binding to send it over a pipe."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Binding:
        """Restores a binding received over a pipe."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**known)


def copied(samples: Sequence[Sample], names: Collection[str] | None = None) -> list[Sample]:
    """Copies samples with deep-copied columns, so that a reward cannot modify the dataset.

    Args:
        samples: the samples to copy.
        names: columns to copy, dropping all others; None copies every column.

    Raises:
        ColumnError: if a value cannot be copied; the message names its column and the remedy.
    """
    memo: dict[int, Any] = {}  # objects shared between samples are copied once
    own = []
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
                    f"({type(error).__name__}: {error}): give its class a __deepcopy__ (which returns self if it never "
                    "changes), or a key in its place by which the reward finds it"
                ) from error
        own.append(replace(sample, columns=columns))
    return own


def with_every_column(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, each with None in the columns that only others have: parts of them are then scored as all are."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    return [replace(sample, columns={name: sample.columns.get(name) for name in names}) for sample in samples]


def call(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Calls a function and awaits the result if it is awaitable, even inside a running event loop."""
    result = function(*positional, **named)
    if not inspect.isawaitable(result):
        return result

    async def finished() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finished())
    # Event loops do not nest, and notebooks already run one: use a loop on a separate thread.
    outcome: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(finished()))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return outcome[0]


def resolve(path: str) -> Callable[..., Any]:
    """Imports the function named by "module:function".

    Raises:
        ValueError: if `path` does not have this form, or names no callable.
    """
    module, colon, attribute = path.partition(":")
    if not (colon and module and attribute):
        raise ValueError(f"{path!r} names no reward; expected 'module:function'")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{path!r} names no reward: {module} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{path!r} is of type {type(found).__name__}; expected a function")
    return found


def path_of(function: Callable[..., Any]) -> str:
    """Returns the "module:function" path by which another process can import `function`.

    Raises:
        ValueError: if it cannot be imported that way; the message gives the reason and the remedy.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    remedy = "define it at the top level of a module and pass it or its 'module:function', or use isolation='thread'"
    if not module or not name:
        raise ValueError(
            f"a {type(function).__name__} cannot run in a process of its own: only functions have a name by which "
            f"another process finds them; {remedy}"
        )
    if "<lambda>" in name or "<locals>" in name:
        kind = "a lambda" if "<lambda>" in name else "defined inside another function"
        raise ValueError(f"reward {name!r} is {kind}: a process of its own would not find it by name; {remedy}")
    if module == "__main__":
        raise ValueError(
            f"reward {name!r} is defined in the script that is run: a process of its own would have to run the whole "
            f"script to find it; {remedy}"
        )
    try:
        same = resolve(f"{module}:{name}") is function
    except (ImportError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{module}:{name} is not the reward itself: another process would find something else; {remedy}"
        )
    return f"{module}:{name}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) if names else "no columns beside the prompt"
