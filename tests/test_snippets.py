"""Every Python snippet of every page runs (tests/snippets.py says how)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.snippets import ROOT, STAND_INS, run_page, snippets

NOT_PAGES = ("CHANGELOG.md", "_build", "project")
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_snippets_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name)
def test_the_slow_snippets_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page, folder, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    for snippet in snippets(page):
        reason = snippet.not_run
        assert reason is None or len(reason.split()) >= 3, f"{snippet.where}: not run, and no reason"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_with_a_hub_model_says_how_to_go_without_a_hub(page: Path) -> None:
    code = "".join(snippet.code for snippet in snippets(page))
    asked = re.findall(r"""from_pretrained\(\s*["']([^"']+)["']""", code)
    hub = [each for each in asked if each in STAND_INS or ("/" in each and not each.startswith(("runs/", "models/")))]
    text = page.read_text(encoding="utf-8")
    assert not hub or "trl.assets" in text or "offline" in text, f"{name(page)} needs {hub} and shows no offline variant"
