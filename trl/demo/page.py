"""Renders the report of a run as a single HTML file without external resources or scripts."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from html import escape

from trl.demo.figure import DARK, LIGHT, Curves, drawing, style
from trl.demo.outcome import DemoResult, HeldOut, Review
from trl.demo.terminal import clock, plain

SHOWN = 8  # prompts shown before the "more" fold

_STYLE = """
:root { color-scheme: light dark; %s }
@media (prefers-color-scheme: dark) { :root { %s } }
body { margin: 0 auto; max-width: 900px; padding: 24px 20px 60px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 0 0 12px; }
.muted, dt, th, summary { color: var(--muted); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 20px 0; }
dl div { border: 1px solid var(--grid); border-radius: 8px; padding: 10px 14px; }
dt { font-size: 13.5px; } dd { margin: 2px 0 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%%; font-size: 15px; }
th { text-align: left; font-weight: 500; font-size: 13.5px; }
th, td { padding: 8px 12px 8px 0; vertical-align: top; border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }
td:first-child { width: 22%%; } td.text { width: 32%%; min-width: 190px; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td, .settings th { padding: 3px 14px 3px 0; width: auto; }
summary { cursor: pointer; margin: 14px 0; }
"""


def page(result: DemoResult) -> str:
    """Returns the report as HTML, even of an interrupted run; escapes texts and sets a restrictive CSP."""
    names = {name: f"var(--{name})" for name in LIGHT}
    sheet = _STYLE % (_variables(LIGHT), _variables(DARK)) + style(names)
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    title = "PPO for positive film reviews"
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{sheet}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        '<p class="muted">A tiny GPT-2 that writes film reviews learns to please a tiny BERT sentiment classifier. At each step '
        f"it writes {result.settings.batch_size} reviews, the classifier scores them, and PPO makes the better ones more "
        "likely; a KL penalty keeps it close to the initial model.</p>",
        *(["<p>This run was interrupted; the report covers the finished steps.</p>"] if result.interrupted else []),
        _headline(result),
        "<h2>Score and KL per step</h2>",
        drawing(curves_of(result)) if result.rows else "<p>No step was finished.</p>",
        *(_texts(result.before, result.after) if result.before is not None else []),
        "<h2>Settings</h2>",
        _settings(result),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def curves_of(result: DemoResult) -> Curves:
    """Returns the data to plot."""
    return Curves(
        score=[row.positive for row in result.rows],
        kl=[row.kl for row in result.rows],
        batch_size=result.settings.batch_size,
        held_out=(
            None if result.before is None else result.before.positive,
            None if result.after is None else result.after.positive,
        ),
    )


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _headline(result: DemoResult) -> str:
    before, after = result.before, result.after
    figures: dict[str, str] = {}
    if before is not None and after is not None:
        figures["mean P(POSITIVE), held-out prompts"] = f"{before.positive:.2f} → {after.positive:.2f}"
        figures["KL to the reference, nats per review"] = f"{after.kl:.1f}"
        figures["perplexity under the reference"] = f"{before.perplexity:.0f} → {after.perplexity:.0f}"
        figures["different word pairs"] = f"{before.distinct_2:.0%} → {after.distinct_2:.0%}"
    figures["steps, reviews"] = f"{len(result.rows)}, {len(result.rows) * result.settings.batch_size:,}"
    figures["minutes"] = clock(result.seconds)
    return (
        "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures.items()) + "</dl>"
    )


def _texts(before: HeldOut, after: HeldOut | None) -> list[str]:
    after_reviews = [None] * len(before.reviews) if after is None else after.reviews
    rows = [
        _row(before_review, after_review)
        for before_review, after_review in zip(before.reviews, after_reviews, strict=True)
    ]
    shown, folded = rows[:SHOWN], rows[SHOWN:]
    parts = [
        "<h2>The same prompts before and after</h2>",
        '<p class="muted">Prompts held out of training, sampled with the same random numbers before and after. These are the '
        f"first {len(shown)}, not a selection.</p>",
        _table(shown),
    ]
    if folded:
        parts.append(f"<details><summary>{len(folded)} more</summary>{_table(folded)}</details>")
    return parts


def _table(rows: list[str]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in ("prompt", "P", "before", "P", "after"))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(before: Review, after: Review | None) -> str:
    cells = [f"<td>{escape(plain(before.prompt))} …</td>"]
    for review in (before, after):
        number, words = ("", "") if review is None else (f"{review.positive:.2f}", escape(plain(review.response)))
        cells.append(f'<td class="number">{number}</td><td class="text">{words}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _settings(result: DemoResult) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in asdict(result.settings).items()
    )
    return f'<table class="settings"><tbody>{rows}</tbody></table>'
