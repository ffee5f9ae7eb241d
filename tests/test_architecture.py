"""The floors of the library, enforced: docs/architecture.md says why each of these lines stands.

Reads the source only. Imports inside functions count too: loading something late does not turn it the other way round.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trl"

# Ground first. A room imports from the floors below it; rooms of one floor are strangers to each other.
FLOORS = (
    {"legacy"},
    {"types", "files", "redaction", "import_utils", "assets", "pretrained", "health", "untrusted", "startup", "errors"},
    {"protocols", "functional"},
    {"kernels"},
    {"models", "rollout", "rewards", "data", "trackers", "state"},
    {"training", "report"},
    {"algorithms"},
    {"runs"},
    {"core", "doctor"},
    {"trainer", "extras"},
    {"feedback", "demo"},
    {"cli", "__main__"},
    {"__init__"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Installed wherever this library is. Anything else may be missing, so no module asks for it while it loads.
REQUIRED = {"torch", "transformers", "accelerate", "numpy", "safetensors", "huggingface_hub", "trl"}
# What kernels replace on a model, and give back.
REPLACED = {"forward", "_attn_implementation"}
# Methods of an accelerator in which every process must take part.
COLLECTIVES = {"gather", "gather_for_metrics", "reduce", "pad_across_processes", "wait_for_everyone"}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported; `from x import y` gives x.y, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def at_import_time(tree: ast.Module) -> ast.Module:
    """The statements that run when a module is loaded: no function bodies, no `if TYPE_CHECKING`."""

    class Trim(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return node.orelse
            return self.generic_visit(node)

    return Trim().visit(tree)


def untyped_trainer(node: ast.AST) -> bool:
    """A parameter that hides what it needs of a trainer."""
    if not isinstance(node, ast.arg) or node.arg != "trainer":
        return False
    return node.annotation is None or ast.unparse(node.annotation) == "Any"


def violations(path: str, source: str) -> list[str]:
    """What is wrong with a module, `path` being relative to the package: "functional/kl.py"."""
    parts = path.removesuffix(".py").split("/")
    room = parts[0]
    if room not in LEVEL:
        return [f"{path}: the room {room!r} stands on no floor; give it one in FLOORS"]
    package = ".".join(["trl", *parts[:-1]])
    found = []
    for line, name in imports(ast.parse(source), package):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "trl" and room != "__init__" and other not in (room, "__version__"):
            other = other if other in LEVEL else "__init__"
            if LEVEL[other] >= LEVEL[room]:
                found.append(f"{path}:{line}: {room} imports {name}, which does not stand on a floor below")
        own = name.startswith(("torch", "trl.types.", "trl.functional")) or root in sys.stdlib_module_names
        if room == "functional" and not own:
            found.append(f"{path}:{line}: functional imports {name}; it knows torch and trl.types alone")
        if room != "training" and name.startswith("torch.distributed"):
            found.append(f"{path}:{line}: collective calls live in training/, not {name}")
    for line, name in imports(at_import_time(ast.parse(source)), package):
        root = name.split(".")[0]
        if root not in REQUIRED and root not in sys.stdlib_module_names and (path, root) not in ONLY_WHERE_INSTALLED:
            found.append(f"{path}:{line}: imports {name} at module level; it may not be installed")
    for node in ast.walk(ast.parse(source)):
        if room in ("training", "state", "runs", "algorithms") and untyped_trainer(node):
            found.append(f"{path}:{node.lineno}: trainer is annotated as no type; it is a RunState or a Learner")
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if node.attr in REPLACED and isinstance(node.ctx, ast.Store) and path != "kernels/door.py":
            found.append(f"{path}:{node.lineno}: {owner}.{node.attr} is replaced by kernels/door.py alone")
        if node.attr == "backward" and path != "training/loop.py":
            found.append(f"{path}:{node.lineno}: {owner}.backward belongs to training/loop.py")
        if room != "training" and (
            f"{owner}.{node.attr}" == "torch.distributed"
            or (owner.endswith("accelerator") and node.attr in COLLECTIVES)
        ):
            found.append(f"{path}:{node.lineno}: collective calls live in training/, not {owner}.{node.attr}")
    return found


# Modules that are imported inside functions alone, after the package was found; what it decorates is at module level.
ONLY_WHERE_INSTALLED = {("kernels/triton_softmax.py", "triton")}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_module_keeps_to_its_floor(path: str) -> None:
    assert violations(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_a_file_name_stands_once() -> None:
    """An editor's "open file" and a traceback's last line then say which module is meant."""
    names = [name for name in (path.split("/")[-1] for path in MODULES) if name not in ("__init__.py", "__main__.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("runs/keeper.py", "def f(trainer: Any): ...", "trainer is annotated as no type"),
        ("functional/kl.py", "from trl.models import evaluate", "does not stand on a floor below"),
        ("functional/kl.py", "from trl import protocols", "does not stand on a floor below"),
        ("functional/kl.py", "import numpy as np", "torch and trl.types alone"),
        ("functional/kl.py", "from transformers import AutoModel", "torch and trl.types alone"),
        ("types.py", "from trl.functional.kl import k1", "does not stand on a floor below"),
        ("types.py", "from .functional.kl import k1", "does not stand on a floor below"),
        ("models/head.py", "from ..rollout import generate", "does not stand on a floor below"),
        ("models/head.py", "from trl.data import collators", "does not stand on a floor below"),
        ("models/head.py", "def f():\n    import trl.trainer", "does not stand on a floor below"),
        ("algorithms/ppo.py", "from trl import PPOConfig", "does not stand on a floor below"),
        ("algorithms/ppo.py", "from trl.core import whiten", "does not stand on a floor below"),
        ("algorithms/ppo.py", "loss.backward()", "backward belongs"),
        ("trainer/ppo.py", "self.accelerator.backward(loss)", "backward belongs"),
        ("models/trunk.py", "def f(layer, quick):\n    layer.forward = quick", "kernels/door.py alone"),
        ("trainer/ppo.py", "from torch import distributed", "collective calls"),
        ("trainer/ppo.py", "import torch.distributed as dist", "collective calls"),
        ("trainer/ppo.py", "import torch\ntorch.distributed.all_reduce(x)", "collective calls"),
        ("trainer/ppo.py", "means = self.accelerator.gather(x)", "collective calls"),
        ("models/adapters.py", "from peft import LoraConfig", "may not be installed"),
        ("models/adapters.py", "try:\n    import peft\nexcept ImportError:\n    pass", "may not be"),
        ("models/adapters.py", "class A:\n    import datasets", "may not be installed"),
        ("models/adapters.py", "import torch, matplotlib.pyplot as plt", "may not be installed"),
        ("cellar/wine.py", "", "stands on no floor"),
    ],
)
def test_checker_finds(path: str, source: str, reason: str) -> None:
    assert any(reason in line for line in violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/kl.py", "import math\nimport torch.nn.functional as F\nfrom trl.types import Tally"),
        ("functional/kl.py", "from .masked import masked_mean\nfrom trl.functional import gae"),
        ("functional/kl.py", "class F:\n    @staticmethod\n    def backward(ctx, grad): return grad"),
        ("functional/kl.py", "chosen = logits.gather(-1, tokens)"),
        ("models/adapters.py", "def load():\n    import peft\n    return peft"),
        ("models/adapters.py", "if TYPE_CHECKING:\n    from peft import PeftModel"),
        ("training/loop.py", "loss.backward()"),
        ("kernels/door.py", "def f(layer, quick):\n    layer.forward = quick"),
        ("models/trunk.py", "plain = layer.forward"),
        ("trainer/base.py", "def card():\n    from trl import __version__"),
        ("training/ranks.py", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("trainer/ppo.py", "from trl.training import optimize\nfrom trl.core import whiten"),
        ("__init__.py", "from trl.trainer import PPOTrainer"),
    ],
)
def test_checker_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_library_is_there() -> None:
    assert {"types.py", "core.py", "functional/masked.py"} <= set(MODULES)
