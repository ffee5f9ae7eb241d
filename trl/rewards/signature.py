"""How a reward function wants to be called, from its signature. Standard library only."""

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
    """Which arguments a reward function takes."""

    samples: bool = False  # the samples themselves, and nothing else
    positional: int = 0  # how many of prompts and completions come by position, from the first
    named: tuple[str, ...] = ()  # which of prompts, completions, prompt_ids, completion_ids come by name
    columns: tuple[str, ...] = ()  # columns by name
    required: tuple[str, ...] = ()  # those of them that have no default
    every_column: bool = False  # **columns

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Binding:
        """Reads the signature of `function`.

        Raises:
            ValueError: if it cannot be called as a reward.
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
        """Whether token ids are among the arguments."""
        return self.samples or "prompt_ids" in self.named or "completion_ids" in self.named

    def wanted(self, samples: Sequence[Sample], name: str) -> list[str]:
        """The columns of `samples` that the function gets, in the order of their first appearance.

        Raises:
            ColumnError: if there is none that the function requires.
        """
        present = list(dict.fromkeys(column for sample in samples for column in sample.columns))
        if missing := [column for column in self.required if column not in present]:
            raise ColumnError(f"reward {name!r} needs the column {missing[0]!r}; the prompts have {_listed(present)}")
        if self.samples or self.every_column:
            return [column for column in present if self.samples or column not in _OWN]
        return [column for column in present if column in self.columns]

    def arguments(self, samples: Sequence[Sample], columns: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments of a call; a sample that lacks one of `columns` has None there."""
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
        """For the other end of a pipe."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Binding:
        """From the other end of a pipe."""
        known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**known)


def copied(samples: Sequence[Sample], names: Collection[str] | None = None) -> list[Sample]:
    """The same samples with columns of their own: whatever a reward does to these, the dataset stays as it is.

    Args:
        samples: as they were drawn.
        names: of the columns that are needed; None is all.

    Raises:
        ColumnError: if a value cannot be copied, naming its column and what to do.
    """
    memo: dict[int, Any] = {}  # an object that several samples share is copied once
    own = []
    for sample in samples:
        columns = {}
        for name, value in sample.columns.items():
            if names is not None and name not in names:
                continue
            try:
                columns[name] = copy.deepcopy(value, memo)
            except Exception as error:  # whatever an object raises that is not made to be copied
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
    """Calls a function and, if it is asynchronous, waits for what it returns, whether or not a loop runs here."""
    result = function(*positional, **named)
    if not inspect.isawaitable(result):
        return result

    async def finished() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finished())
    # A loop does not run inside another, as under a notebook; it does on a thread of its own.
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
    """The function that "module:function" names.

    Raises:
        ValueError: if it is not of this form, there is no such name, or it cannot be called.
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
    """The "module:function" under which another process finds `function`.

    Raises:
        ValueError: if it would not find it there, with the reason and what to do.
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
