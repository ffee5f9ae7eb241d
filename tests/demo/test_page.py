"""What the demo draws and prints, from made-up numbers: no model is needed."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from trl.demo.figure import DARK, LIGHT, Curves, nice_ticks, standalone
from trl.demo.outcome import DemoResult, DemoSettings, HeldOut, Review, StepRow
from trl.demo.page import page
from trl.demo.terminal import Progress, clock, comparison, plain, verdict

HOSTILE = [
    "<script>alert(1)</script>",
    "</svg></td></table></style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<a href='javascript:alert(1)'>x</a> <svg onload=alert(1)>",
    "{{ 7*7 }} ${7*7} <%= 7*7 %>",
    "\u202e\u2066right to left\u2069\u200f",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x1b[2J\x00\x08\x7f",
    "line\r\nbreaks\u2028and\u2029more",
    "]]>&lt;&amp;'\"",
    "x" * 1_000_000,
]


def step(number: int, positive: float = 0.5, kl: float = 1.0) -> StepRow:
    return StepRow(
        step=number,
        samples=number * 64,
        positive=positive,
        positive_std=0.1,
        kl=kl,
        kl_coef=0.2,
        response_tokens=20.0,
        entropy=4.0,
        value_explained=0.1,
        seconds=1.0,
    )


def held_out(positive: float, texts: list[str]) -> HeldOut:
    reviews = [Review(prompt=text, response=text, positive=positive) for text in texts]
    return HeldOut(reviews=reviews, positive=positive, kl=8.0, perplexity=40.0, distinct_2=0.8)


def result(**changes: object) -> DemoResult:
    made = DemoResult(
        settings=DemoSettings(),
        rows=[step(1, 0.5, 0.0), step(2, 0.7, 3.0), step(3, 0.9, 7.0)],
        before=held_out(0.49, HOSTILE),
        after=held_out(0.93, HOSTILE),
        seconds=71.0,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


class Reader(HTMLParser):
    """Notes every tag, attribute and piece of text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_page_holds_no_markup_of_the_model():
    harmless, hostile = (
        read(page(result(before=held_out(0.49, texts), after=held_out(0.93, texts))))
        for texts in (["fine"] * len(HOSTILE), HOSTILE)
    )
    assert hostile.tags == harmless.tags
    assert hostile.attributes == harmless.attributes
    assert "script" not in hostile.tags
    assert not [name for name, _ in hostile.attributes if name.startswith("on") or name in ("href", "src", "style")]
    assert "<script>alert(1)</script>" in hostile.texts  # shown, as text


def test_page_allows_nothing_but_its_own_style_sheet():
    html = page(result())
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    (sheet,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'"
    assert "prefers-color-scheme: dark" in sheet
    assert "url(" not in sheet and "@import" not in sheet
    links = [value for name, value in read(html).attributes if value and "://" in value]
    assert links == ["http://www.w3.org/2000/svg"]


def test_page_of_a_run_that_reached_nothing():
    html = page(result(rows=[], before=None, after=None, interrupted=True))
    assert "interrupted" in html and "No step was finished" in html
    assert "<svg" not in html


def test_page_of_a_run_without_an_end():
    reader = read(page(result(after=None, interrupted=True)))
    assert "svg" in reader.tags and "table" in reader.tags
    assert "0.49" in reader.texts and "0.93" not in reader.texts


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_curves_are_xml_with_every_step(colours: dict[str, str]):
    curves = Curves(score=[0.5, 0.7, 0.9], kl=[0.0, 3.0, 7.0], batch_size=64, held_out=(0.49, 0.93))
    tree = ElementTree.fromstring(standalone(curves, colours))
    name = "{http://www.w3.org/2000/svg}"
    lines = {line.get("class"): line.get("points", "").split() for line in tree.iter(f"{name}polyline")}
    assert {kind: len(points) for kind, points in lines.items()} == {"line score": 3, "line kl": 3}
    words = [text.text for text in tree.iter(f"{name}text")]
    assert {"0.90", "7.0", "PPO step (64 reviews each)", "held-out prompts: 0.49 → 0.93"} <= set(words)
    assert "from 0.50 to 0.90" in (tree.findtext(f"{name}desc") or "")
    # A higher score stands higher: y grows downwards.
    heights = [float(point.split(",")[1]) for point in lines["line score"]]
    assert heights == sorted(heights, reverse=True)
    _, _, width, height = map(float, tree.get("viewBox", "").split())
    for points in lines.values():
        assert all(0 < float(p.split(",")[0]) < width and 0 < float(p.split(",")[1]) < height for p in points)


def test_numbers_that_are_not_finite_leave_a_gap():
    curves = Curves(score=[0.5, math.nan, 0.9], kl=[0.0, math.inf, 7.0], batch_size=64)
    drawn = standalone(curves, LIGHT)
    assert "nan" not in drawn.split("<desc")[1].split("</desc>")[1] and "inf" not in drawn.split("</desc>")[1]
    assert drawn.count("<polyline") == 4


@pytest.mark.parametrize(
    ("highest", "count", "ticks"),
    [(40, 8, [0, 5, 10, 15, 20, 25, 30, 35, 40]), (7.3, 4, [0, 2, 4, 6, 8]), (1.0, 4, [0, 0.25, 0.5, 0.75, 1])],
)
def test_ticks(highest: float, count: int, ticks: list[float]):
    assert nice_ticks(highest, count) == pytest.approx(ticks)


def test_plain_text_has_no_control_characters():
    for text in HOSTILE:
        shown = plain(text)
        assert shown.isprintable()
        assert len(shown) <= 2000
    assert plain("\x1b[31mred\x1b[0m \x1b]0;title\x07 blue\x9b2J\x00") == "red blue"
    assert plain("a\r\nb\u2028c") == "a b c"
    assert plain("\u202eabc") == "abc"


def test_comparison_keeps_to_the_width():
    text = comparison(held_out(0.4, HOSTILE), held_out(0.9, HOSTILE), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(line.isprintable() for line in text.splitlines())
    assert "before 0.40" in text and "after  0.90" in text


def test_verdict_says_what_was_reached():
    text = verdict(result())
    assert "0.49 before, 0.93 after 3 steps; KL 8.0 nats" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_many_in_a_file():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = Progress(stream, 2, 64)
        progress.update(step(1, 0.51, 0.0))
        progress.update(step(2, 0.62, 1.5))
        progress.close()
    assert terminal.getvalue().count("\n") == 1 and terminal.getvalue().count("\r") == 2
    first, second = file.getvalue().splitlines()
    assert re.fullmatch(r"step 1/2  P\(POSITIVE\) 0\.51  KL  0\.00  \d+ samples/s  ETA \d:\d\d", first)
    assert "ETA 0:00" in second
    assert clock(75) == "1:15"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps=0"), ({"batch_size": 10}, "batch_size=10 is not a multiple of minibatches=4")],
)
def test_settings_that_cannot_be(wrong: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**wrong)
