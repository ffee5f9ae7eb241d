"""Renders the report: one HTML file with everything inlined, whose policy allows no network and no other script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from trl.report.charts import figures, series_of
from trl.report.reading import MAX_TEXT, Run, finite
from trl.report.verdict import verdict
from trl.untrusted import one_line, visible

_REWARD = "reward/"


def page(runs: Sequence[Run], *, live: bool = False, folder_link: bool = False) -> str:
    """The report on one run, or on several compared, as HTML.

    Args:
        runs: the runs; the first one's bands are shaded.
        live: poll the server that sent the page for changes.
        folder_link: link the folders of completions, which lie beside the page.
    """
    shown = figures(runs)
    scripts = [_asset("uPlot.iife.min.js"), _asset("report.js")]
    style = _asset("uPlot.min.css") + _asset("report.css")
    return _template().render(
        runs=runs,
        verdicts=[verdict(run) for run in runs],
        figures=shown,
        groups=list(dict.fromkeys(figure.chart.group for figure in shown)),
        differences=_differences(runs),
        settings=[sorted(_flat(run.config).items()) for run in runs],
        events=[[visible(line, MAX_TEXT) for line in run.events[-30:]] for run in runs],
        total=sum(len(run.steps_recorded) for run in runs),
        shown_steps=len({(number, s["step"]) for number, run in enumerate(runs) for s in run.completions}),
        samples_completions=not all(run.offline for run in runs),
        folder_link=folder_link,
        live=live,
        policy=_policy(scripts, style, live=live),
        style=style,
        scripts=scripts,
        data=_script_json(_data(runs, [figure.drawing for figure in shown], shown, live=live)),
        one_line=one_line,
        visible=visible,
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    environment.filters["prose"] = _prose
    return environment.get_template("report.html")


def _prose(text: str) -> Any:
    """Escaped text, with what stands between backticks as code."""
    from jinja2.utils import markupsafe

    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text))))


@cache
def _asset(name: str) -> str:
    return resources.files("trl.report").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def _policy(scripts: Sequence[str], style: str, *, live: bool) -> str:
    """Content security policy: exactly these scripts and this style sheet, and for a live page its own server."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    parts = [
        "default-src 'none'",
        f"script-src {' '.join(map(digest, scripts))}",
        f"style-src {digest(style)}",
        "base-uri 'none'",
        "form-action 'none'",
        "img-src data:",  # the empty icon, which keeps browsers from asking for /favicon.ico
    ]
    # A live page parses the server's next version, which is a sink of trusted types.
    parts += ["connect-src 'self'"] if live else ["require-trusted-types-for 'script'", "trusted-types 'none'"]
    return "; ".join(parts)


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character of markup in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, so no line separators either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(runs: Sequence[Run], drawings: Sequence[Any], shown: Sequence[Any], *, live: bool) -> dict[str, Any]:
    charts = [figure.chart for figure in shown]
    return {
        "live": live,
        "charts": drawings,
        "runs": [
            {
                "name": run.name,
                "steps": [row["step"] for row in run.rows],
                "series": series_of(run, charts),
            }
            for run in runs
        ],
        "samples": [_sample(number, row) for number, run in enumerate(runs) for row in run.completions],
    }


def _sample(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    tokens = row.get("tokens")
    sample = {
        "run": number,
        "step": row["step"],
        "id": visible(str(row["prompt_id"]), 200),
        "prompt": visible(row["prompt"], MAX_TEXT),
        "text": visible(row["completion"], MAX_TEXT),
        "score": _short(row.get("score")),
        "kl": _short(row.get("kl")),
        "advantage": _short(row.get("advantage")),
        "length": row["length"],
        "end": visible(row["finish_reason"] or "", 40),
        "parts": {
            one_line(key[len(_REWARD) :]): _short(value) for key, value in row.items() if key.startswith(_REWARD)
        },
    }
    if row.get("error"):
        sample["error"] = visible(row["error"], 600)
    if tokens:
        record = json.loads(tokens)
        sample["tokens"] = record | {"text": [visible(text) for text in record["text"]]}
    return sample


def _short(value: Any) -> float | None:
    known = finite(value)
    return None if known is None else float(f"{known:.4g}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted name, as text."""
    result: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            result |= _flat(value, f"{name}.")
        else:
            result[one_line(name)] = visible(json.dumps(value, ensure_ascii=False, default=str), 300)
    return result


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings in which the runs differ, with each run's value."""
    flats = [_flat(run.config) for run in runs]
    names = sorted({name for flat in flats for name in flat})
    rows = [(name, [flat.get(name, "–") for flat in flats]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
