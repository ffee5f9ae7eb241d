"""`import trl` costs nothing, and says clearly what it does not have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trl

ROOT = Path(trl.__file__).parent.parent
HEAVY = ("torch", "transformers", "accelerate", "numpy", "peft", "datasets", "safetensors")


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_lazy() -> None:
    code = f"import json, sys, trl; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(run(code)) == []


def test_import_is_fast() -> None:
    code = "import time; t = time.process_time(); import trl; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.15


def test_looking_around_stays_lazy() -> None:
    code = "import json, sys, trl; trl.__version__, trl.__all__, dir(trl), trl.is_peft_available(), hasattr(trl, 'x'); "
    code += f"print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    assert json.loads(run(code)) == []


def test_core_needs_no_transformers() -> None:
    assert run("import sys, trl.core; print('transformers' in sys.modules)").strip() == "False"


def test_version_is_a_plain_string_for_the_build() -> None:
    line = next(line for line in Path(trl.__file__).read_text(encoding="utf-8").splitlines() if "__version__ =" in line)
    assert line == f'__version__ = "{trl.__version__}"'


def test_all_names_are_there_and_listed() -> None:
    assert set(trl.__all__) <= set(dir(trl))
    for name in trl.__all__:
        assert getattr(trl, name) is not None
    assert {"core", "models", "trainer", "import_utils"} <= set(dir(trl))


@pytest.mark.parametrize("name", ["core", "functional", "import_utils", "models", "protocols", "trainer", "types"])
def test_submodules_are_attributes(name: str) -> None:
    assert trl.__getattr__(name).__name__ == f"trl.{name}"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'trl' has no attribute 'PPPOTrainer'"):
        _ = trl.PPPOTrainer
    with pytest.raises(ImportError, match="cannot import name 'PPPOTrainer'"):
        exec("from trl import PPPOTrainer")


def test_peft_can_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from trl import is_peft_available

    assert is_peft_available() is (importlib.util.find_spec("peft") is not None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        assert is_peft_available() is False
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert is_peft_available() is False


def test_torch_is_new_enough() -> None:
    from trl.import_utils import is_torch_greater_2_0

    assert is_torch_greater_2_0() is True
