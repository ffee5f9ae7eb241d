"""The page: what it says, what it allows, and that nothing in a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.hostile import HUGE, TEXTS
from tests.report.runs import CONFIG, make_run, record, row
from trl.report import write_report
from trl.report.html_page import page
from trl.report.reading import read_run
from trl.trackers import RunDirectory


class Reader(HTMLParser):
    """Notes every tag with its attributes, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.comments: list[str] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag in ("script", "style"):
            self._open.append((tag, dict(attrs).get("id") or f"{tag}{len(self.scripts)}"))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            name = self._open[-1][1]
            self.scripts[name] = self.scripts.get(name, "") + data
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self) -> Any:
        return json.loads(self.scripts["report-data"])


def report(*folders: Path, **options: Any) -> Reader:
    return Reader(page([read_run(folder, share=len(folders)) for folder in folders], **options))


def hostile_run(path: Path, texts: list[str]) -> Path:
    """Every text as completion, and as prompt, error, setting, event, finding and name of a reward and of a setting."""
    names = ["name " + text.encode("utf-8", "replace").decode()[:200] for text in texts]
    make_run(
        path,
        texts=["fine"],
        config=CONFIG | {"train": {"steps": 20, "names": {f"{i} {n}": n for i, n in enumerate(names)}}},
        events=names,
        findings=[
            {"step": 3, "code": n, "severity": n, "title": n, "evidence": n, "remedy": n, "page": n} for n in names
        ],
    )
    with RunDirectory.open(path) as run:
        records = [
            record(
                0,
                text,
                prompt=text[:900],
                prompt_id=text[:200],
                error="error " + text[:900],
                tokens=True,
                finish_reason=text[:50],
                rewards={names[i - i % 25]: 1.0},
            )
            for i, text in enumerate(texts)
        ]
        run.log_completions(records, 10)
    return path


def test_texts_of_a_run_become_no_markup(tmp_path: Path) -> None:
    harmless = report(hostile_run(tmp_path / "harmless", ["fine"] * len(TEXTS)))
    hostile = report(hostile_run(tmp_path / "hostile", TEXTS))

    assert hostile.tags == harmless.tags
    assert not hostile.comments
    shown = {sample["text"] for sample in hostile.data["samples"]}
    assert "<script>alert(1)</script>" in shown and "a⟨U+0000⟩b" in shown and "⟨U+202E⟩gnp.exe" in shown
    assert not [c for text in shown for c in text if c != "\n" and c != "\t" and ord(c) < 32]


def test_page_allows_its_own_scripts_and_nothing_else(tmp_path: Path) -> None:
    text = page([read_run(make_run(tmp_path / "run"))])
    policy = html.unescape(re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[0])

    def digests(tag: str) -> list[str]:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]

    rules = dict(part.split(" ", 1) for part in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests("script")),
        "style-src": " ".join(f"'sha256-{digest}'" for digest in digests("style")),
        "base-uri": "'none'",
        "form-action": "'none'",
        "img-src": "data:",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    reader = Reader(text)
    for tag, attributes in reader.tags:
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("src", "style", "srcset"), (tag, name)
            assert name != "href" or (value or "").startswith(("#", "data:,")), (tag, value)
    assert "innerHTML" not in text and "eval(" not in text and "https://" not in reader.scripts["report-data"]


def test_a_page_says_how_the_run_went(tmp_path: Path) -> None:
    finding = {
        "step": 7,
        "code": "x",
        "severity": "warning",
        "title": "Dropout is on",
        "evidence": "p=0.1",
        "remedy": "Turn it off.",
    }
    rows = [
        row(step, **{"ppo/policy/clipfrac": 0.5 if step > 8 else 0.1, "eval/score_mean": 0.1 * step})
        for step in range(1, 21)
    ]
    words = report(make_run(tmp_path / "polite", rows=rows, findings=[finding])).words
    for expected in (
        "Needs a look Finished at step 20 of 20",
        "The mean score rose from 0.15 (first 2 steps) to 1.95 (last 2).",
        "On held-out prompts the score went from 0.1 at step 1 to 2 at step 20.",
        "The policy is 5.85 nats per response away from the reference, on average over the last 2 steps, with a target of 6.",
        "Outside the healthy band now: Clip fraction.",
        "Dropout is on step 7",
        "What to do: Turn it off.",
        "Outside its healthy band (at most 0.3) in 12 steps, between steps 9 and 20.",
        "Many tokens hit the clip range",
        "0.1 at step 1, 2 at step 20; lowest 0.1 at step 1, highest 2 at step 20.",
        "Samples of 2 steps.",
    ):
        assert expected in words, expected


def test_every_chart_has_a_text_alternative(tmp_path: Path) -> None:
    reader = report(make_run(tmp_path / "run"))
    plots = [dict(attrs) for tag, attrs in reader.tags if dict(attrs).get("data-chart")]
    ids = {dict(attrs).get("id") for _, attrs in reader.tags}
    assert len(plots) == len(reader.data["charts"]) == 18
    for plot in plots:
        assert plot["role"] == "img" and plot["tabindex"] == "0" and plot["aria-label"]
        assert plot["aria-describedby"] in ids


def test_runs_are_compared_and_their_settings(tmp_path: Path) -> None:
    other = CONFIG | {"ppo": CONFIG["ppo"] | {"cliprange": 0.1}}
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", steps=10, config=other)
    reader = report(first, second)
    assert [run["name"] for run in reader.data["runs"]] == ["first", "second"]
    assert [len(run["steps"]) for run in reader.data["runs"]] == [20, 10]
    words = reader.words
    assert "2 runs compared" in words and "What differs" in words and "ppo.cliprange 0.2 0.1" in words
    assert "ppo.target 6.0 6.0" not in words


def test_runs_of_different_algorithms_share_their_charts(tmp_path: Path) -> None:
    rows = [{key.replace("ppo/", "grpo/"): value for key, value in row(step).items()} for step in range(1, 21)]
    grpo = make_run(tmp_path / "grpo", rows=rows, config={"ppo": {}, "algorithm": {"name": "grpo"}})
    reader = report(make_run(tmp_path / "ppo"), grpo)
    assert all("ppo/policy/entropy" in run["series"] for run in reader.data["runs"])


def test_a_run_without_steps(tmp_path: Path) -> None:
    reader = report(make_run(tmp_path / "run", steps=0, summary={}))
    assert "No step is done yet" in reader.words and "No completions are recorded." in reader.words
    assert reader.data["charts"] == [] and reader.data["samples"] == []


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    rows = [row(1), row(2, **{"score/mean": float("nan"), "objective/kl": float("inf")}), row(3)]
    reader = report(make_run(tmp_path / "run", steps=3, rows=rows))
    assert reader.data["runs"][0]["series"]["score/mean"] == [0.1, None, 0.3]


def test_a_line_of_ten_megabytes_is_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    (run / "completions" / "step-00000001.parquet").unlink()
    sample = {"step": 1, "prompt_id": "0", "prompt": "", "completion": HUGE, "length": 9, "finish_reason": "stop"}
    (run / "completions" / "step-00000001.jsonl").write_text(json.dumps(sample) + "\n")
    text = page([read_run(run)])
    assert len(text) < 1_000_000
    (shown,) = {sample["text"] for sample in Reader(text).data["samples"]}
    assert shown.endswith("… (9,996,003 more characters)")


def test_a_report_is_written_into_the_run_or_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    assert write_report([run, run], tmp_path / "both.html") == tmp_path / "both.html"
    with pytest.raises(ValueError, match="runs is empty"):
        write_report([])
    with pytest.raises(ValueError, match="is not a run directory: it has no"):
        write_report(tmp_path)


def test_other_steps_are_linked_from_a_report_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.report.reading._MAX_STEPS_READ", 1)
    run = make_run(tmp_path / "run")
    links = [
        value for _, attrs in Reader(write_report(run).read_text()).tags for name, value in attrs if name == "href"
    ]
    assert "completions/" in links
    elsewhere = Reader(write_report(run, tmp_path / "elsewhere.html").read_text())
    assert "completions/" not in [value for _, attrs in elsewhere.tags for name, value in attrs if name == "href"]
    assert "Samples of 1 of 2 steps; all are in completions/ of the run folder." in elsewhere.words
