"""The reader of old releases, on a package made up here; the comparison with this library; and the page that it writes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "compat" / "data"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up by name.
    spec.loader.exec_module(module)
    return module


reader, table = load("read_old_trl"), load("compat_table")

SOURCES = {
    "trl/__init__.py": """
from typing import TYPE_CHECKING
import os
__version__ = "9.8.7"
_import_structure = {"core": ["stretch"], "gone": ["Phantom"]}
if TYPE_CHECKING:
    from .trainer import PPOTrainer
raise RuntimeError("a reader must not run this")
""",
    "trl/core.py": """
import torch
from collections import abc as shapes
PAD = -1
def stretch(x, *, by: int = 2, low=-float("Inf")): return x
def _hidden(): ...
class Sampler:
    def __call__(self): ...
    @property
    def size(self): ...
    def _draw(self): ...
""",
    "trl/trainer/__init__.py": "from trl.trainer.ppo_trainer import PPOTrainer as PPOTrainer\n",
    "trl/trainer/ppo_config.py": """
import os
from dataclasses import dataclass, field
@dataclass
class PPOConfig:
    needed: str
    rate: float = 1e-5
    tags: dict = field(default_factory=dict)
    name: str = field(default=os.sep, metadata={"help": "computed"})
    if rate is not None:
        nothing = 1
""",
    "trl/trainer/ppo_trainer.py": """
from ..core import stretch
class PPOTrainer:
    _tags = ["a"]
    def __init__(self, config=None, *rest, **more):
        self.config = config
        config.seen = 1
    def _hook(self, x, y: "int" = (1, 2)):
        if x:
            return None
        return x, y, x
    @staticmethod
    def helper(x): return x
""",
    "trl/trainer/other_trainer.py": "class Other: ...\n",
    "tests/test_core.py": "def test_nothing(): ...\n",
}


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    wheel = tmp_path / "trl-9.8.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, source in SOURCES.items():
            archive.writestr(name, source)
    assert reader.main([str(wheel), "--output", str(tmp_path / "facts")]) == 0
    read: dict[str, Any] = json.loads((tmp_path / "facts" / "9.8.7.json").read_text(encoding="utf-8"))
    return read


def test_reads_modules_and_names_without_running_them(facts: dict[str, Any]):
    assert facts["version"] == "9.8.7"
    assert "trl.trainer.other_trainer" in facts["modules"]
    assert not any(module.startswith("tests") for module in facts["modules"])
    assert facts["places"] == {
        "trl": ["PPOTrainer", "__version__", "stretch"],
        "trl.core": ["PAD", "Sampler", "stretch"],
        "trl.trainer": ["PPOTrainer"],
        "trl.trainer.ppo_config": ["PPOConfig"],
        "trl.trainer.ppo_trainer": ["PPOTrainer", "stretch"],
    }


def test_reads_signatures_defaults_and_what_is_returned(facts: dict[str, Any]):
    assert facts["signatures"] == {
        "trl.core.Sampler.__call__": [],
        "trl.core.stretch": ["x", "*", ["by", 2], ["low", "-inf"]],
        "trl.trainer.ppo_trainer.PPOTrainer.__init__": [["config", None], "*rest", "**more"],
        "trl.trainer.ppo_trainer.PPOTrainer._hook": ["x", ["y", [1, 2]]],
        "trl.trainer.ppo_trainer.PPOTrainer.helper": ["x"],
    }
    assert facts["returns"] == {"__init__": 0, "_hook": 3, "helper": 1}
    assert facts["attributes"] == {"PPOTrainer": ["_tags", "config"]}


def test_reads_settings_in_their_order(facts: dict[str, Any]):
    assert list(facts["config"].items()) == [
        ("needed", "<required>"),
        ("rate", 1e-05),
        ("tags", {}),
        ("name", "<computed>"),
    ]


def test_reads_of_0_4_6_what_introspection_of_it_gave():
    """`trl_0_4_6.json` was made by importing the release: another way to the same facts."""
    introspected = json.loads((DATA / "trl_0_4_6.json").read_text(encoding="utf-8"))
    read = json.loads((DATA / "releases" / "0.4.6.json").read_text(encoding="utf-8"))
    assert list(read["config"].items()) == list(introspected["config"].items())
    for module, names in introspected["places"].items():
        foreign = {"top_k_top_p_filtering"}  # trl.core imported it from transformers
        assert set(names) - foreign <= set(read["places"][module]), module
    by_end = {".".join(path.split(".")[-2:]): signature for path, signature in read["signatures"].items()}
    checked = 0
    for path, signature in introspected["signatures"].items():
        end = ".".join(path.split(".")[-2:])
        if end in by_end:
            assert by_end[end] == signature, path
            checked += 1
    assert checked > 50


def has(x: Any, y: int = 1, *, z: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("theirs", "broken", "different"),
    [
        (["x"], [], []),
        (["x", ["y", 1], ["z", False]], ["`z` in another position"], []),
        (["x", ["y", 2]], [], ["`y=1`, was `2`"]),
        (["x", "w"], ["no argument `w`"], []),
        ([["y", 1], "x"], ["`y` in another position", "`x` in another position"], []),
        ([["y", 1]], ["`y` in another position", "needs `x`"], []),
    ],
)
def test_compares_calls(theirs: list[Any], broken: list[str], different: list[str]):
    assert table.problems(theirs, inspect.signature(has)) == (broken, different)


def test_releases_in_words():
    everything = ["0.4.6", "0.5.0", "0.6.0", "0.7.11"]
    assert table.releases(everything, everything) == "0.4–0.7"
    assert table.releases(["0.4.6", "0.6.0", "0.7.11"], everything) == "0.4, 0.6–0.7"
    assert table.releases(["0.5.0"], everything) == "0.5"


class Trainer:
    """A trainer of one hook, which `use` below runs."""

    def hook(self, x: int, y: int) -> tuple[int, int]:
        return x, y


@pytest.mark.parametrize(
    ("name", "signature", "returned", "expected"),
    [
        ("hook", ["x", "y"], 2, ("same", "")),
        ("hook", ["x"], 2, ("missing", "called with other arguments: too many positional arguments")),
        ("hook", ["x", "y"], 3, ("missing", "called, but its 3 values are not taken")),
        ("other", ["x"], 1, ("missing", "never called")),
    ],
)
def test_tries_overrides(
    monkeypatch: pytest.MonkeyPatch, name: str, signature: list[Any], returned: int, expected: tuple[str, str]
):
    def use(trainer: type, folder: str, **attributes: Any) -> None:
        x, y = type("Made", (trainer,), attributes)().hook(1, 2)

    monkeypatch.setattr(table, "use", use)
    status, note = table.overridden(Trainer, name, signature, returned)
    assert status == expected[0]
    assert note.startswith(expected[1])
    assert bool(note) == bool(expected[1])


def test_page_has_a_row_for_every_name():
    page = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    facts = table.load()
    assert list(facts) == ["0.4.6", "0.5.0", "0.6.0", "0.7.11", "0.8.6", "0.9.6", "0.10.1", "0.11.4"]
    for version, entry in facts.items():
        rows = {*entry["config"], *entry["modules"], *entry["places"]["trl"], *entry["attributes"]["PPOTrainer"]}
        rows |= {f"{m}.{n}" for m, names in entry["places"].items() if m != "trl" for n in names}
        rows |= {f"PPOTrainer.{name}" for name in entry["returns"]}
        assert [name for name in sorted(rows) if f"| `{name}` |" not in page] == [], version
