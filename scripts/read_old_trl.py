"""Reads the PPO interface of old TRL releases from their wheels: names, signatures and defaults, one JSON per release.

The sources are parsed, never imported or run, and no code is kept: only facts about the interface.

pip download --no-deps --only-binary :all: -d wheels trl==0.7.11   # once per release
python scripts/read_old_trl.py wheels/*.whl                        # writes tests/compat/data/releases/0.7.11.json
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "compat" / "data" / "releases"
# Modules whose names and signatures are read; of every other module only the path is.
PPO_SIDE = (
    "trl",
    "trl.core",
    "trl.environment",
    "trl.environment.base_environment",
    "trl.extras",
    "trl.extras.best_of_n_sampler",
    "trl.extras.dataset_formatting",
    "trl.import_utils",
    "trl.models",
    "trl.models.modeling_base",
    "trl.models.modeling_value_head",
    "trl.models.utils",
    "trl.trainer",
    "trl.trainer.base",
    "trl.trainer.model_config",
    "trl.trainer.ppo_config",
    "trl.trainer.ppo_trainer",
    "trl.trainer.reward_config",
    "trl.trainer.utils",
)
CONFIGS = ("PPOConfig", "ModelConfig", "RewardConfig")
# Classes that clients subclass: their private methods are part of the interface.
SUBCLASSED = ("PPOTrainer", "BaseTrainer", "PreTrainedModelWrapper")
COMPUTED = "<computed>"  # a default that is an expression
REQUIRED = "<required>"  # a field without a default

Parameter = str | list[Any]


def constant(node: ast.expr) -> Any:
    """Value of a default: a literal, "-inf", or `COMPUTED`."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node).lower().replace('"', "'")
        return "-inf" if text in ("-float('inf')", "float('-inf')") else COMPUTED
    return list(value) if isinstance(value, tuple | set) else value


def parameters(function: ast.FunctionDef, *, method: bool) -> list[Parameter]:
    """Parameters in order: "name", ["name", default], "*args", "**kwargs"; keyword-only ones follow "*"."""
    a = function.args
    named = [*a.posonlyargs, *a.args]
    defaults: list[ast.expr | None] = [None] * (len(named) - len(a.defaults))
    defaults += a.defaults
    pairs = list(zip(named, defaults, strict=True))
    bound = method and "staticmethod" not in decorators_of(function)
    result = [_parameter(*pair) for pair in (pairs[1:] if bound else pairs)]
    if a.vararg is not None:
        result.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        result.append("*")
    result += [_parameter(*pair) for pair in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return [*result, *([f"**{a.kwarg.arg}"] if a.kwarg is not None else [])]


def _parameter(argument: ast.arg, default: ast.expr | None) -> Parameter:
    return argument.arg if default is None else [argument.arg, constant(default)]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, with those inside `if`, `try` and `with`, but not those of functions."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from statements(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def assigned(node: ast.stmt) -> Iterator[str]:
    """Plain names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def names_of(tree: ast.Module, modules: set[str], package: str) -> list[str]:
    """Public names of a module: what it defines, and what it imports or lazily exports from elsewhere in trl."""
    names: set[str] = set()
    for node in statements(tree.body):
        names.update(assigned(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").split(".")[0] == "trl"):
            names.update(alias.asname or alias.name for alias in node.names)
        if isinstance(node, ast.Assign) and "_import_structure" in assigned(node):
            lazy: dict[str, list[str]] = ast.literal_eval(node.value)
            names.update(name for home, row in lazy.items() if f"{package}.{home}" in modules for name in row)
    return sorted(name for name in names if not name.startswith("_") or name == "__version__")


def fields_of(config: ast.ClassDef) -> dict[str, Any]:
    """Fields of a dataclass and their defaults, in order."""
    fields: dict[str, Any] = {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = REQUIRED if node.value is None else _field_default(node.value)
    return fields


def _field_default(node: ast.expr) -> Any:
    if not (isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "field"):
        return constant(node)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "default_factory" in given:
        empty: dict[str, Any] = {"dict": {}, "list": []}
        return empty.get(ast.unparse(given["default_factory"]), COMPUTED)
    return constant(given["default"]) if "default" in given else REQUIRED


def decorators_of(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    return {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}


def methods_of(cls: ast.ClassDef) -> dict[str, list[Parameter]]:
    """Signatures of a class's methods; private ones only where clients override them."""
    methods = {
        node.name: parameters(node, method=True)
        for node in cls.body
        if isinstance(node, ast.FunctionDef)
        and "property" not in decorators_of(node)
        and (not node.name.startswith("_") or node.name in ("__init__", "__call__") or cls.name in SUBCLASSED)
    }
    if "dataclass" in decorators_of(cls) and not cls.bases and cls.name not in CONFIGS:
        fields = fields_of(cls).items()
        methods["__init__"] = [name if default == REQUIRED else [name, default] for name, default in fields]
    return methods


def returned_by(function: ast.FunctionDef) -> int:
    """How many values a function returns: the length of the tuple in its last `return`, else 1, or 0 without one."""
    returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    if not returns:
        return 0
    last = max(returns, key=lambda value: value.lineno)
    return len(last.elts) if isinstance(last, ast.Tuple) else 1


def attributes_of(cls: ast.ClassDef) -> list[str]:
    """Attributes that the class body or any method assigns."""
    names = {name for node in cls.body for name in assigned(node)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return sorted(names)


def read(wheel: Path) -> dict[str, Any]:
    """Facts about one release.

    Returns:
        version; modules, every module's path; places, public names by module; config, the fields of PPOConfig in order,
        and other_configs; attributes of the classes that clients subclass; returns, how many values each method of
        PPOTrainer returns; signatures by dotted path.
    """
    with zipfile.ZipFile(wheel) as archive:
        sources = {
            name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): archive.read(name).decode("utf-8")
            for name in archive.namelist()
            if name.startswith("trl/") and name.endswith(".py")
        }
    trees = {module: ast.parse(source) for module, source in sources.items()}
    facts: dict[str, Any] = {
        "version": wheel.name.split("-")[1],
        "modules": sorted(trees),
        "places": {},
        "config": {},
        "other_configs": {},
        "attributes": {},
        "returns": {},
        "signatures": {},
    }
    for module in PPO_SIDE:
        if module not in trees:
            continue
        facts["places"][module] = names_of(trees[module], set(trees), module)
        for node in statements(trees[module].body):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                facts["signatures"][f"{module}.{node.name}"] = parameters(node, method=False)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for name, signature in methods_of(node).items():
                    facts["signatures"][f"{module}.{node.name}.{name}"] = signature
                if node.name in SUBCLASSED:
                    facts["attributes"][node.name] = attributes_of(node)
                if node.name == "PPOTrainer":
                    facts["returns"] = {f.name: returned_by(f) for f in node.body if isinstance(f, ast.FunctionDef)}
                if node.name == "PPOConfig":
                    facts["config"] = fields_of(node)
                elif node.name in CONFIGS:
                    facts["other_configs"][node.name] = fields_of(node)
    for key in ("returns", "signatures"):
        facts[key] = dict(sorted(facts[key].items()))
    return facts


def dump(facts: dict[str, Any]) -> str:
    """JSON with one line per module, field and signature, so that releases can be compared with diff."""
    parts = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the JSON files")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for wheel in options.wheels:
        facts = read(wheel)
        path = options.output / f"{facts['version']}.json"
        path.write_text(dump(facts), encoding="utf-8")
        print(f"{path.name}: {len(facts['config'])} settings, {len(facts['signatures'])} signatures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
