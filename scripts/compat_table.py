"""Compares the PPO interface of old TRL releases with this library and writes docs/compat.md.

python scripts/compat_table.py          # writes
python scripts/compat_table.py --check  # only says whether it would change

The facts about the releases are in tests/compat/data/releases (scripts/read_old_trl.py). What this library does with
them is tried: names are imported, settings are given to PPOConfig, methods are overridden in a subclass and a step is
run.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compat.md"
DATA = ROOT / "tests" / "compat" / "data" / "releases"
MARK = "<!-- compat -->"
COMPUTED = "<computed>"
TRAINER = "trl.trainer.ppo_trainer.PPOTrainer"
# Called by a script, so an override of them is called without our doing.
ENTRY_POINTS = ("__init__", "step", "generate", "log_stats")
# Called by nothing in TRL either, so an override of them never did anything.
UNCALLED = ("_filter_kwargs", "_show_tokens")

Facts = Mapping[str, Mapping[str, Any]]  # by version, oldest first
Signature = Sequence[Any]  # as scripts/read_old_trl.py writes it


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table. `status` is same, accepted, missing or refused."""

    cells: tuple[str, ...]
    status: str
    note: str = ""

    def __str__(self) -> str:
        text = self.status + (f": {self.note}" if self.note else "")
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in (*self.cells, text)) + " |"


# Facts ---------------------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """Facts by version, oldest first."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("*.json")]
    return {f["version"]: f for f in sorted(read, key=lambda f: [int(part) for part in f["version"].split(".")])}


def releases(having: Iterable[str], everything: Sequence[str]) -> str:
    """Minor releases in words: "0.4–0.6, 0.11"."""
    runs: list[list[str]] = []
    wanted = set(having)
    for i, version in enumerate(everything):
        if version not in wanted:
            continue
        if i and runs and runs[-1][-1] == everything[i - 1]:
            runs[-1].append(version)
        else:
            runs.append([version])
    short = [[v.rpartition(".")[0] for v in run] for run in runs]
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in short)


def by_name(facts: Facts, of: Callable[[Mapping[str, Any]], Iterable[str]]) -> dict[str, list[str]]:
    """Versions that have each name, in alphabetical order of the names."""
    found: dict[str, list[str]] = {}
    for version, entry in facts.items():
        for name in of(entry):
            found.setdefault(name, []).append(version)
    return dict(sorted(found.items()))


def variants(facts: Facts, path: str) -> list[tuple[Signature, list[str]]]:
    """The signatures that `path` had, each with its versions, oldest first."""
    found: dict[str, list[str]] = {}
    for version, entry in facts.items():
        if path in entry["signatures"]:
            found.setdefault(json.dumps(entry["signatures"][path]), []).append(version)
    return [(json.loads(text), versions) for text, versions in found.items()]


def same_number(value: Any) -> Any:
    """6 for 6.0: releases spelt defaults either way."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shown(signature: Signature) -> str:
    """A signature as in a `def`, without its defaults."""
    return ", ".join(p if isinstance(p, str) else f"{p[0]}=" for p in signature)


# What is here --------------------------------------------------------------------------------------------------------


def imported(module: str, name: str | None = None) -> tuple[str, str, Any]:
    """Tries `import module` or `from module import name`: status, note and what was found."""
    try:
        found = importlib.import_module(module)
        return ("same", "", found if name is None else getattr(found, name))
    except ModuleNotFoundError as error:
        if not str(error).startswith("No module named 'trl"):
            return "refused", first_line(error), None
        return "missing", "" if name is None else f"no module `{error.name}`", None
    except AttributeError:
        return "missing", "", None
    except Exception as error:
        return "refused", first_line(error), None


def first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


def callable_at(path: str) -> Any:
    """Our counterpart of a dotted path of theirs: at the same path, or of the same name in `trl`."""
    parts = path.split(".")
    depth = next(i for i, part in enumerate(parts) if part[:1].isupper()) if path != path.lower() else len(parts) - 1
    _, _, found = imported(".".join(parts[:depth]), parts[depth])
    if found is None:
        _, _, found = imported("trl", parts[depth])
    for part in parts[depth + 1 :]:
        found = None if found is None else getattr(found, part, None)
    return found


def problems(theirs: Signature, ours: inspect.Signature) -> tuple[list[str], list[str]]:
    """What a call written for `theirs` meets in `ours`.

    Returns:
        Arguments that break the call, and differences in defaults that do not.
    """
    parameters = [p for p in ours.parameters.values() if p.name not in ("self", "cls")]
    kinds = {p.kind for p in parameters}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    named = {p.name: p for p in parameters}
    broken, different = [], []
    given: set[str] = set()
    in_order = True
    for i, parameter in enumerate(theirs):
        name, default = (parameter, None) if isinstance(parameter, str) else parameter
        if name == "*":
            in_order = False
        elif name.startswith("*"):
            kind = inspect.Parameter.VAR_KEYWORD if name.startswith("**") else inspect.Parameter.VAR_POSITIONAL
            if kind not in kinds and len(theirs) > 2:
                broken.append(f"no `{name}`")
            in_order = False
        elif name not in named:
            if inspect.Parameter.VAR_POSITIONAL not in kinds or not isinstance(parameter, str):
                broken.append(f"no argument `{name}`")
        else:
            given.add(name)
            anywhere = inspect.Parameter.VAR_POSITIONAL in kinds  # ours sorts out what it is given by position
            if in_order and not anywhere and (i >= len(positional) or positional[i].name != name):
                broken.append(f"`{name}` in another position")
            elif not isinstance(parameter, str):
                expected = -float("inf") if default == "-inf" else default
                mine = named[name].default
                mine = list(mine) if isinstance(mine, tuple) else mine
                if default != COMPUTED and mine != expected:
                    different.append(f"`{name}={mine!r}`, was `{expected!r}`")
    passes_on = any(isinstance(p, str) and p.startswith("**") for p in theirs)
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in given and not passes_on:
            broken.append(f"needs `{parameter.name}`")
    return broken, different


def compare(path: str, facts: Facts) -> tuple[str, str]:
    """Status and note of a call of `path` in all its signatures."""
    from trl.trainer.hooks import NOT_HERE

    function, name = callable_at(path), path.rpartition(".")[2]
    if function is None and path.startswith(f"{TRAINER}.") and name in NOT_HERE:
        return "refused", f"use {NOT_HERE[name]}"
    if function is None:
        return "missing", ""
    orders = [list(order) for order in getattr(function, "orders", ())]
    signature = inspect.signature(function)
    broken: dict[str, list[str]] = {}
    different: dict[str, list[str]] = {}
    for theirs, versions in variants(facts, path):
        names = [p.lstrip("*") if isinstance(p, str) else p[0] for p in theirs]
        if names in orders:  # sorts out by itself in which one it is called
            continue
        for found, texts in zip((broken, different), problems(theirs, signature), strict=True):
            for text in texts:
                found.setdefault(text, []).extend(versions)
    texts = [f"{text} ({releases(versions, list(facts))})" for text, versions in (broken or different).items()]
    return ("missing" if broken else "accepted" if different else "same"), "; ".join(texts)


# Tables --------------------------------------------------------------------------------------------------------------


def table(heading: str, columns: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [f"## {heading}", "", f"| {' | '.join(columns)} | status |", "|" + " --- |" * (len(columns) + 1)]
    return "\n".join([*lines, *map(str, rows)])


def names_from_trl(facts: Facts) -> Iterable[Row]:
    for name, versions in by_name(facts, lambda f: f["places"]["trl"]).items():
        status, note, _ = imported("trl", name)
        yield Row(cells=(f"`{name}`", releases(versions, list(facts))), status=status, note=note)


def module_paths(facts: Facts) -> Iterable[Row]:
    for name, versions in by_name(facts, lambda f: f["modules"]).items():
        status, note, _ = imported(name)
        yield Row(cells=(f"`{name}`", releases(versions, list(facts))), status=status, note=note)


def names_in_modules(facts: Facts) -> Iterable[Row]:
    """Every name of the modules below `trl`; a function's with its arguments."""
    paths = by_name(facts, lambda f: [f"{m}.{n}" for m, names in f["places"].items() if m != "trl" for n in names])
    for path, versions in paths.items():
        module, _, name = path.rpartition(".")
        status, note, _ = imported(module, name)
        if status == "same" and variants(facts, path):
            status, note = compare(path, facts)
        yield Row(cells=(f"`{path}`", releases(versions, list(facts))), status=status, note=note)


def methods(facts: Facts, wanted: Callable[[str], bool]) -> Iterable[Row]:
    """Methods of the classes whose paths are wanted, as calls."""
    signatures = by_name(facts, lambda f: [p for p in f["signatures"] if p.split(".")[-2][:1].isupper() and wanted(p)])
    for path, versions in signatures.items():
        if callable_at(path.rpartition(".")[0]) is None:
            continue  # the row of the class says so
        status, note = compare(path, facts)
        name = ".".join(path.split(".")[-2:])
        yield Row(cells=(f"`{name}`", releases(versions, list(facts))), status=status, note=note)


def settings(facts: Facts, config: str) -> Iterable[Row]:
    """Fields of a config: their defaults then and here, and what giving one does."""

    def of(entry: Mapping[str, Any]) -> Mapping[str, Any]:
        return entry["config"] if config == "PPOConfig" else entry["other_configs"].get(config, {})

    reachable, why, ours = imported("trl", config)
    for name, versions in by_name(facts, of).items():
        then: dict[str, list[str]] = {}
        for version in versions:
            then.setdefault(repr(same_number(of(facts[version])[name])), []).append(version)
        whole = len(then) == 1
        defaults = [f"`{text}`" + ("" if whole else f" ({releases(v, list(facts))})") for text, v in then.items()]
        given = of(facts[versions[-1]])[name]
        if ours is None:
            status, note, here = reachable, why, None
        else:
            status, note, here = given_setting(ours, name, "name" if given == COMPUTED else given)
        if status == "same" and any(text != repr(same_number(here)) for text in then):
            status = "accepted"
        shown_here = "" if status in ("missing", "refused") else f"`{same_number(here)!r}`"
        cells = (f"`{name}`", releases(versions, list(facts)), ", ".join(defaults), shown_here)
        yield Row(cells=cells, status=status, note=note)


def given_setting(config: Any, name: str, value: Any) -> tuple[str, str, Any]:
    """Status and note of `config(name=value)`, and our default."""
    try:
        config(**{name: value})
    except TypeError:
        return "missing", "", None
    except (ValueError, ImportError) as error:
        return "refused", first_line(error), None
    return "same", "", getattr(config(), name)


class Called(BaseException):
    """Raised by an override that `step` has reached; the text says why its arguments are wrong, if they are."""


def use(trainer: type, folder: str, **attributes: Any) -> Any:
    """Does with a trainer what a script does: make, load, generate, step, log, save.

    Returns:
        The trainer, which has all attributes that it ever gets.
    """
    import torch
    from datasets import Dataset

    from tests.helpers import tiny_gpt2, tiny_tokenizer
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, create_reference_model

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-3, early_stopping=True)
    data = Dataset.from_dict({"input_ids": [[3, 4], [5, 6]], "query": ["w3 w4", "w5 w6"], "unused": [0, 1]})
    kind = type(trainer.__name__, (trainer,), attributes) if attributes else trainer
    made = kind(config, model, create_reference_model(model), tiny_tokenizer(), data, data_collator=list)
    queries = [torch.tensor(row["input_ids"]) for row in next(iter(made.dataloader))]
    responses = made.generate(queries, max_new_tokens=3, return_prompt=False, do_sample=True, top_k=0)
    scores = [torch.tensor(1.0), torch.tensor(-1.0)]
    stats = made.step(queries, responses, scores)
    made.log_stats(stats, {"query": ["a", "b"], "response": ["c", "d"]}, scores)
    made.save_pretrained(folder)
    return made


def as_in_def(signature: Signature) -> inspect.Signature:
    """The signature of a method, `self` first."""
    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    for entry in signature:
        bare, default = (entry, kinds.empty) if isinstance(entry, str) else entry
        kind = (
            kinds.VAR_KEYWORD
            if bare.startswith("**")
            else kinds.VAR_POSITIONAL
            if bare.startswith("*")
            else kinds.POSITIONAL_OR_KEYWORD
        )
        parameters.append(kinds(bare.lstrip("*"), kind, default=default))
    return inspect.Signature(parameters)


def overridden(trainer: type, name: str, signature: Signature, returned: int) -> tuple[str, str]:
    """Status and note of a subclass that overrides `name`: whether that is called as it was, and its values are taken.

    Args:
        trainer: our class.
        name: the method.
        signature: its arguments then.
        returned: how many values it returned then.
    """
    theirs = as_in_def(signature)
    base = getattr(trainer, name, None)

    def stop(*args: Any, **kwargs: Any) -> Any:
        try:
            theirs.bind(*args, **kwargs)
        except TypeError as error:
            raise Called(f"called with other arguments: {error}") from None
        raise Called

    def answer(*args: Any, **kwargs: Any) -> Any:
        assert base is not None
        values = base(*args, **kwargs)
        return (*values, values[-1])[:returned] if isinstance(values, tuple) else values

    for hook in (stop, answer):
        vars(hook)["__signature__"] = theirs
    with tempfile.TemporaryDirectory() as folder:
        try:
            use(trainer, folder, **{name: stop})
            return "missing", "never called"
        except Called as called:
            if str(called):
                return "missing", str(called)
        except (TypeError, ValueError, NotImplementedError) as error:
            return "refused", first_line(error)
        if returned > 1 and base is not None:
            try:
                use(trainer, folder, **{name: answer})
            except (TypeError, ValueError):
                return "missing", f"called, but its {returned} values are not taken"
    return "same", ""


def hooks(facts: Facts) -> Iterable[Row]:
    """Methods of PPOTrainer as overrides of a subclass."""
    from trl import PPOTrainer

    names = by_name(facts, lambda f: [p for p in f["signatures"] if p.startswith(f"{TRAINER}.")])
    for path in names:
        name = path.rpartition(".")[2]
        if name in (*ENTRY_POINTS, *UNCALLED):
            continue
        for signature, versions in variants(facts, path):
            for returned in sorted({facts[version]["returns"][name] for version in versions}):
                having = [version for version in versions if facts[version]["returns"][name] == returned]
                status, note = overridden(PPOTrainer, name, signature, returned)
                cells = (f"`{name}`", releases(having, list(facts)), f"`{shown(signature)}`", str(returned))
                yield Row(cells=cells, status=status, note=note)


def attributes(facts: Facts) -> Iterable[Row]:
    """Attributes of a trainer that has made a step."""
    from trl import PPOTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = use(PPOTrainer, folder)
    for name, versions in by_name(facts, lambda f: f["attributes"]["PPOTrainer"]).items():
        try:
            getattr(trainer, name)
            status, note = "same", ""
        except AttributeError as error:
            status, note = ("refused" if ": use " in str(error) else "missing"), first_line(error)
        yield Row(cells=(f"`{name}`", releases(versions, list(facts))), status=status, note=note)


def page(facts: Facts) -> str:
    """All tables, in Markdown."""
    name, since = "name", "in TRL"

    def of_trainer(path: str) -> bool:
        return path.startswith(f"{TRAINER}.")

    def of_others(path: str) -> bool:
        return not of_trainer(path)

    config_columns = (name, since, "default there", "default here")
    return "\n\n".join(
        [
            table("Settings of PPOConfig", config_columns, settings(facts, "PPOConfig")),
            table("Methods of PPOTrainer, called", (name, since), methods(facts, of_trainer)),
            table("Methods of PPOTrainer, overridden", (name, since, "arguments", "values returned"), hooks(facts)),
            table("Attributes of PPOTrainer", (name, since), attributes(facts)),
            table("Methods of other classes", (name, since), methods(facts, of_others)),
            table("Settings of ModelConfig", config_columns, settings(facts, "ModelConfig")),
            table("Settings of RewardConfig", config_columns, settings(facts, "RewardConfig")),
            table("Names in `trl`", (name, since), names_from_trl(facts)),
            table("Names in modules", (name, since), names_in_modules(facts)),
            table("Modules", ("module", since), module_paths(facts)),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    check = parser.parse_args(arguments).check
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    old = PAGE.read_text(encoding="utf-8")
    before, _, after = old.split(MARK)
    new = f"{before}{MARK}\n\n{page(load())}\n\n{MARK}{after}"
    if check:
        if new != old:
            print("docs/compat.md is out of date: run scripts/compat_table.py", file=sys.stderr)
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
