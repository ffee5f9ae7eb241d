"""Every Python snippet of every page runs (tests/snippets.py says how)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.snippets import ROOT, STAND_INS, make_stand_ins, run_page, snippets

NOT_PAGES = ("CHANGELOG.md", "_build", "project")
# Pages that a test of their own runs, by the same function, and looks closer at.
RUN_ELSEWHERE = {
    "README.md": "test_quickstart.py",
    "docs/adapters.md": "extras/test_pages.py",
    "docs/best-of-n.md": "extras/test_pages.py",
    "docs/doctor.md": "doctor/test_doctor_page.py",
    "docs/dpo.md": "trainer/offline/test_pages.py",
    "docs/how-to/new-algorithm.md": "algorithms/test_new_algorithm_page.py",
    "docs/reward-models.md": "trainer/offline/test_pages.py",
    "docs/rewards.md": "rewards/test_page.py",
    "docs/sft.md": "trainer/offline/test_page.py",
}
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/**/*.ipynb")])
    if not set(NOT_PAGES) & set(page.relative_to(ROOT).parts) and snippets(page)
]
SLOW = [page for page in PAGES if any(snippet.slow for snippet in snippets(page))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if name(page) not in RUN_ELSEWHERE and page.suffix == ".md"], ids=name
)
def test_the_snippets_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page, folder)


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_a_page_that_is_run_elsewhere_is_named_there(page: str) -> None:
    text = (ROOT / "tests" / RUN_ELSEWHERE[page]).read_text(encoding="utf-8")
    assert page.rpartition("/")[2] in text


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".ipynb"], ids=name)
def test_a_notebook_runs(page: Path, folder: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    make_stand_ins(folder)
    notebook = nbformat.read(page, as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute(cwd=str(folder))
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".ipynb"], ids=name)
def test_a_notebook_is_stored_without_outputs(page: Path) -> None:
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-b",
        "html",
        "-d",
        tmp_path / "cache",
        "docs",
        tmp_path / "html",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "PPOConfig" in (tmp_path / "html/reference/api/trl.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_the_slow_snippets_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page, folder, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    for snippet in snippets(page):
        reason = snippet.not_run
        assert reason is None or len(reason.split()) >= 3, f"{snippet.where}: not run, and no reason"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=name)
def test_a_page_with_a_hub_model_says_how_to_go_without_a_hub(page: Path) -> None:
    code = "".join(snippet.code for snippet in snippets(page))
    asked = re.findall(r"""from_pretrained\(\s*["']([^"']+)["']""", code)
    hub = [each for each in asked if each in STAND_INS or ("/" in each and not each.startswith(("runs/", "models/")))]
    text = page.read_text(encoding="utf-8")
    assert not hub or "trl.assets" in text or "offline" in text, (
        f"{name(page)} needs {hub} and shows no offline variant"
    )
