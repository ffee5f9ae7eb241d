"""What is in the source tree is what a user installs, and it takes the place of any other `trl`."""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import trl
from tests.test_architecture import MODULES, imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl"
MEBIBYTE = 1 << 20
EXTRAS_RUN = ("peft", "datasets", "runs", "tensorboard")  # those that the suite installs
PYTHONS_RUN = ("3.10", "3.11", "3.13")


def shipped_files() -> set[str]:
    """Every file of the package on disk, as a path under the repository's root."""
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_version_stands_once():
    for name, line in {
        "CITATION.cff": f"version: {trl.__version__}\n",
        "CHANGELOG.md": f"## [{trl.__version__}]",
    }.items():
        assert line in (ROOT / name).read_text(encoding="utf-8"), f"{name} does not say {line!r}"


def ranges(project: dict[str, Any]) -> dict[str, str]:
    """The ranges of what the library and its tests need, by distribution."""
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS_RUN for line in extras[extra])]
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in wanted)


def pins(end: str) -> dict[str, str]:
    """Versions in constraints-oldest.txt or constraints-newest.txt, by distribution."""
    lines = (ROOT / f"constraints-{end}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_every_import_is_declared(project: dict[str, Any]):
    extras = {extra for extra in project["optional-dependencies"] if extra not in ("test", "dev")}
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    declared = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
    for module in MODULES:
        parts = module.removesuffix(".py").split("/")
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        for line, name in imports(tree, ".".join(["trl", *parts[:-1]])):
            root = name.split(".")[0]
            if root == "triton":  # comes with torch for CUDA, and is used nowhere else
                continue
            known = root == "trl" or root in sys.stdlib_module_names or {"yaml": "pyyaml"}.get(root, root) in declared
            assert known, f"trl/{module}:{line} imports {name}, which pyproject.toml does not declare"


def test_ranges_are_what_is_run(project: dict[str, Any]):
    """`make test-oldest` runs every lower bound, and `make test-newest` ends where the ranges do."""
    oldest, newest = pins("oldest"), pins("newest")
    wanted = ranges(project)
    assert set(oldest) == set(newest) == set(wanted)
    for name, bounds in wanted.items():
        least, _, cap = bounds.removeprefix(">=").partition(",<")
        assert re.fullmatch(rf"{re.escape(least)}(\.0)*", oldest[name]), f"{name}{bounds}, but {oldest[name]} is run"
        if cap:
            major, minor = (int(part) for part in cap.split("."))
            assert newest[name].startswith(f"{major}.{minor - 1}."), f"{name}{bounds}, but {newest[name]} is run"


def test_trackers_are_extras(project: dict[str, Any]):
    extras = project["optional-dependencies"]
    for name in ("tensorboard", "wandb", "trackio"):
        (line,) = extras[name]
        assert line.startswith(f"{name}>=")


def test_tensorboard_brings_no_nightly_tensorflow(project: dict[str, Any]):
    """2.16.0 required tf-keras-nightly, and 2.16.1 tf-keras."""
    (line,) = project["optional-dependencies"]["tensorboard"]
    assert tuple(int(part) for part in line.partition(">=")[2].split(".")) > (2, 16, 1)
    assert "trl[datasets,peft,runs,tensorboard]" in project["optional-dependencies"]["test"]


def test_the_licence_is_also_that_of_the_models_and_of_the_plots(project: dict[str, Any]):
    licences = {
        line.removeprefix("license:").strip().lower()
        for card in (PACKAGE / "assets").glob("*/README.md")
        for line in card.read_text(encoding="utf-8").splitlines()
        if line.startswith("license:")
    }
    assert licences == {"mit"}
    assert project["license"] == "Apache-2.0 AND MIT"
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in project["license-files"]]
    models, plots = texts[1:]
    assert "Apache License" in texts[0] and "MIT License" in models
    assert "MIT License" in plots and "Leon Sorokin" in plots and (PACKAGE / "report/assets/uPlot.iife.min.js").exists()


def test_systems_and_pythons_are_those_that_were_run(project: dict[str, Any]):
    named = [line for line in project["classifiers"] if line.startswith(("Operating System", "Programming Language"))]
    assert named == [
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {version}" for version in PYTHONS_RUN),
    ]


def test_package_holds_sources_the_type_marker_and_assets_only():
    for name in shipped_files():
        is_asset = name.startswith(("trl/assets/", "trl/report/assets/", "trl/report/templates/"))
        assert name.endswith(".py") or name == "trl/py.typed" or is_asset, f"{name} is no source and no asset"
    assert "trl/py.typed" in shipped_files()


def test_assets_stay_under_eight_mebibytes():
    size = sum((ROOT / name).stat().st_size for name in shipped_files() if name.startswith("trl/assets/"))
    assert size <= 8 * MEBIBYTE, f"trl/assets holds {size / MEBIBYTE:.1f} MiB"


def test_no_file_of_the_package_is_ignored():
    """What git ignores is left out of the wheel: an unanchored `data/` in .gitignore would take trl/data with it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(sorted(shipped_files())),
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel made from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def other_trl(folder: Path) -> Path:
    """A wheel of another distribution named trl, of a higher version, with a module that this one lacks."""
    path = folder / "trl-99.0-py3-none-any.whl"
    metadata = "trl-99.0.dist-info"
    files = {
        "trl/__init__.py": "__version__ = '99.0'\n",
        "trl/left_over.py": "",
        f"{metadata}/METADATA": "Metadata-Version: 2.1\nName: trl\nVersion: 99.0\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = [f"{name},sha256={digests[name]},{len(text.encode())}" for name, text in files.items()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{metadata}/RECORD", "\n".join([*record, f"{metadata}/RECORD,,"]) + "\n")
    return path


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path]):
    _, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == shipped_files()
    for licence in ("LICENSE", "trl/assets/LICENSE"):
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in names)
    assert wheel.stat().st_size < 9 * MEBIBYTE


@pytest.mark.slow
def test_sdist_holds_what_tests_and_builds_need(built: tuple[Path, Path]):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert shipped_files() <= names
    assert {"constraints.txt", "constraints-oldest.txt", "constraints-newest.txt"} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "tests/conftest.py"} <= names
    assert not {name for name in names if name.startswith(("data/", "runs/", ".venv"))}


@pytest.mark.slow
def test_installed_wheel_imports_every_public_name(built: tuple[Path, Path], tmp_path: Path):
    _, wheel = built
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    script = "import trl; [getattr(trl, name) for name in trl.__all__]; print(trl.__file__)"
    where = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target)).strip()
    assert Path(where).is_relative_to(target)


@pytest.mark.slow
def test_installing_replaces_another_trl_whole(built: tuple[Path, Path], tmp_path: Path):
    """In an environment without torch, too: `import trl` needs nothing but the standard library."""
    _, wheel = built
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for archive in (other_trl(tmp_path), wheel):
        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", archive)
    script = "import trl, os; print(trl.__version__); print(os.path.dirname(trl.__file__))"
    version, folder = run(python, "-c", script, cwd=tmp_path).split("\n")[:2]
    assert version == trl.__version__
    assert not (Path(folder) / "left_over.py").exists()
    assert len(list(Path(folder).parent.glob("trl-*.dist-info"))) == 1
