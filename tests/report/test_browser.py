"""The report in headless Chromium: hostile texts cause no dialog, request or element; a keyboard and a phone suffice."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.hostile import HUGE, TEXTS
from tests.report.runs import make_long_run, make_run, record, row
from tests.report.test_html_page import hostile_run
from trl.report import serve, write_report
from trl.trackers import RunDirectory

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(not HAS_PLAYWRIGHT, reason="no Playwright: pip install playwright"),
]
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


class Visit:
    """A page, with what it did that it must not do."""

    def __init__(self, page: Any, allowed: str) -> None:
        self.page, self.allowed = page, allowed
        self.dialogs: list[str] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(allowed)
        page.wait_for_selector("#count:not(:empty)", timeout=60_000)

    def did_nothing(self) -> bool:
        foreign = [url for url in self.requests if not url.startswith((self.allowed, "blob:", "data:,"))]
        assert (self.dialogs, foreign, self.complaints) == ([], [], [])
        return True


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def visit(browser: Any, address: str, *, width: int = 1280, dark: bool = False) -> Visit:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    return Visit(context.new_page(), address)


# In the page, since a call from here for each of the completions would take minutes: clicks through all pages of the table, opens
# every completion, and counts elements and attributes by name each time, in the document before and in the dialog after.
LOOK = """async () => {
  const count = root => { const n = {}; const add = k => { n[k] = (n[k] || 0) + 1; };
    for (const e of root.querySelectorAll('*')) { add(e.tagName); for (const a of e.attributes) add('@' + a.name); } return n; };
  const counts = [], rest = () => new Promise(done => setTimeout(done, 50));
  for (;;) {
    counts.push(count(document));
    for (const button of document.querySelectorAll('#samples tbody button')) {
      button.click(); await new Promise(requestAnimationFrame); counts.push(count(document.querySelector('#detail')));
      document.querySelector('#close').click();
    }
    await rest();
    if (document.querySelector('#after').disabled) return counts;
    document.querySelector('#after').click();
  }
}"""


def look_at_everything(seen: Visit, least: int) -> list[dict[str, int]]:
    """Elements and attributes by name, on every page of the table and in every completion's dialog."""
    counts: list[dict[str, int]] = seen.page.evaluate(LOOK)
    assert len(counts) > least
    return counts


def plain_texts(texts: list[str]) -> list[str]:
    """Harmless texts, all different, with as many words and lines as the hostile ones have parts of a word diff."""
    return [f"fine {i}" for i in range(len(texts))]


@pytest.mark.parametrize("live", [False, True], ids=["report", "live page"])
def test_hostile_texts_do_nothing(browser: Any, tmp_path: Path, live: bool) -> None:
    counts = {}
    for name, texts in (("harmless", plain_texts(TEXTS)), ("hostile", TEXTS)):
        run = hostile_run(tmp_path / name, texts)
        if live:
            with serve(run) as server:
                seen = visit(browser, server.url)
                counts[name] = look_at_everything(seen, len(TEXTS))
                assert seen.did_nothing()
        else:
            seen = visit(browser, write_report(run).as_uri())
            counts[name] = look_at_everything(seen, len(TEXTS))
            assert seen.did_nothing()
    # A diff has an element per changed word, and a heat map one per five characters.
    words = ("INS", "DEL", "SPAN", "@style", "@class")
    for harmless, hostile in zip(counts["harmless"], counts["hostile"], strict=True):
        for tag in (set(harmless) | set(hostile)) - set(words):
            assert harmless.get(tag) == hostile.get(tag), tag


def test_a_line_of_ten_megabytes(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    with RunDirectory.open(run) as writer:
        writer.log_completions([record(0, HUGE, prompt=HUGE, error=HUGE)], 1)
    seen = visit(browser, write_report(run).as_uri())
    seen.page.click("#samples tbody button")
    assert seen.page.locator("dialog b").count() == 0 and seen.did_nothing()


def test_csv_runs_no_formula(browser: Any, tmp_path: Path) -> None:
    seen = visit(browser, write_report(hostile_run(tmp_path / "run", TEXTS)).as_uri())
    with seen.page.expect_download() as download:
        seen.page.click("#csv")
    import csv

    text = Path(download.value.path()).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert len(rows) == len(TEXTS) + 2
    assert "'=1+1" in {row["text"] for row in rows} and "'@SUM(1+1)" in {row["prompt"] for row in rows}
    for line in rows:
        for name in ("id", "prompt", "text", "end", "error", "run"):
            assert not line[name].lstrip().startswith(("=", "+", "-", "@")), (name, line[name])
    assert {line["score"] for line in rows} >= {"0"} and seen.did_nothing()


@pytest.mark.parametrize("width", [390, 500, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_is_wider_than_the_screen(browser: Any, tmp_path: Path, width: int, dark: bool) -> None:
    run = make_run(tmp_path / "run", texts=["w" * 300, "a fine film " * 30, "short"])
    seen = visit(browser, write_report(run).as_uri(), width=width, dark=dark)
    page = seen.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    narrowest = page.evaluate("Math.min(...[...document.querySelectorAll('.samples td.text')].map(e => e.clientWidth))")
    assert narrowest > 250, "a column of a few letters a line"
    page.click("#samples tbody button")
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 20, 25)") == dark
    assert seen.did_nothing()


def test_the_keyboard_reaches_everything(browser: Any, tmp_path: Path) -> None:
    seen = visit(browser, write_report(make_run(tmp_path / "run")).as_uri())
    page = seen.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the charts"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.chart") == "score"
    page.keyboard.press("End")
    assert "step 20" in page.inner_text("figure:first-of-type .readout")
    page.keyboard.press("ArrowLeft")
    assert "step 19" in page.inner_text("figure:first-of-type .readout")
    page.focus("#heads th:nth-child(2) button")
    page.keyboard.press("Enter")
    assert page.get_attribute("#heads th:nth-child(2)", "aria-sort") == "descending"
    scores = page.locator("#samples td:nth-child(2)").all_inner_texts()
    assert scores == sorted(scores, key=float, reverse=True)
    page.keyboard.press("Enter")
    assert page.get_attribute("#heads th:nth-child(2)", "aria-sort") == "ascending"
    page.select_option("#which", "tokens")
    page.focus("#samples tbody button")
    page.keyboard.press("Enter")
    page.focus(".heat")
    page.keyboard.press("ArrowRight")
    assert "advantage" in page.inner_text("#detail .readout")
    page.keyboard.press("Escape")
    assert not page.is_visible("#detail") and seen.did_nothing()


def test_completions_are_filtered_and_compared(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", texts=[f"film {i}" for i in range(60)])
    with RunDirectory.open(run) as writer:
        writer.log_completions([record(3, "the late film is a joy", score=9.0), record(4, "bad", error="no")], 20)
    page = visit(browser, write_report(run).as_uri()).page
    assert page.inner_text("#count") == "62 samples"
    page.fill("#query", "JOY")
    assert page.inner_text("#count") == "1 of 62 samples"
    page.click("#samples tbody button")
    assert page.locator("#detail ins").all_inner_texts() != [] and page.locator("#detail del").all_inner_texts() == [
        "3"
    ]
    page.click("#close")
    page.fill("#query", "")
    page.select_option("#which", "error")
    assert page.inner_text("#count") == "1 of 62 samples" and "no" in page.inner_text("#samples tbody")
    page.select_option("#which", "best")
    assert page.inner_text("#samples tbody tr:nth-child(1) td:nth-child(2)") == "9"
    page.fill("#from", "20")
    assert page.inner_text("#count") == "2 of 62 samples"


def test_the_live_page_follows_the_run(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary={})
    with serve(run) as server:
        seen = visit(browser, server.url)
        assert "step 20" in seen.page.inner_text("#summary")
        seen.page.wait_for_timeout(2500)  # the first poll learns the version
        with RunDirectory.open(run) as writer:
            writer.log(row(21, **{"score/mean": 7.125}), 21)
            writer.log_completions([record(0, "a new text")], 21)
            seen.page.wait_for_selector("text=Running: step 21", timeout=30_000)
        assert seen.page.inner_text("#n-score").startswith("7.1")
        assert "a new text" in seen.page.inner_text("#samples")
        assert seen.did_nothing()
    seen.page.wait_for_selector("text=the server is gone", timeout=30_000)


@pytest.mark.bench
def test_a_run_of_5000_steps(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what docs/report.md says of speed and size; asserts the size alone."""
    import time

    run = make_long_run(tmp_path / "run")
    started = time.perf_counter()
    path = write_report(run)
    made = time.perf_counter() - started
    assert path.stat().st_size < 25_000_000
    started = time.perf_counter()
    seen = visit(browser, path.as_uri())
    opened = time.perf_counter() - started
    with capsys.disabled():
        print(json.dumps({"seconds to make": made, "megabytes": path.stat().st_size / 1e6, "seconds to open": opened}))
    assert seen.did_nothing()
