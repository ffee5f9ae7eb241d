"""Plots score and KL per step as hand-written SVG, without a plotting dependency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LIGHT = {
    "page": "#ffffff", "text": "#1f2328", "muted": "#59636e", "grid": "#d1d9e0", "score": "#0969da", "kl": "#bc4c00",
}  # fmt: skip
DARK = {
    "page": "#0d1117", "text": "#f0f6fc", "muted": "#9198a1", "grid": "#3d444d", "score": "#4493f8", "kl": "#f0883e",
}  # fmt: skip

STYLE = """
.curves text { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; fill: %(text)s; }
.curves .page { fill: %(page)s; }
.curves .title { font-size: 15px; font-weight: 600; }
.curves .tick, .curves .note { font-size: 12.5px; fill: %(muted)s; }
.curves .value { font-size: 13px; font-weight: 600; }
.curves .grid { stroke: %(grid)s; stroke-width: 1; }
.curves .score { stroke: %(score)s; } .curves .kl { stroke: %(kl)s; }
.curves .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.curves .mark { fill: %(page)s; stroke-width: 2.2; }
.curves .dot.score { fill: %(score)s; } .curves .dot.kl { fill: %(kl)s; }
"""

Scale = Callable[[float], float]  # data value -> pixels
WIDTH, LEFT, RIGHT = 860, 52, 74
PANEL, TOP, GAP, BOTTOM = 168, 40, 52, 52


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Data to plot; index 0 of each series is step 1."""

    score: Sequence[float]  # mean P(POSITIVE) of each batch
    kl: Sequence[float]  # nats per response
    batch_size: int
    held_out: tuple[float | None, float | None] = (None, None)  # mean P(POSITIVE) before and after the run


def style(colours: dict[str, str]) -> str:
    """Returns the plot's style sheet in these colours, which may be `var(--...)`."""
    return STYLE % colours


def standalone(curves: Curves, colours: dict[str, str]) -> str:
    """Returns the plot as a standalone SVG file."""
    return drawing(curves, head=f"<style>{style(colours)}</style>") + "\n"


def drawing(curves: Curves, head: str = "") -> str:
    """Returns the plot as an `<svg>` element to be styled by `style`.

    Args:
        curves: data to plot.
        head: markup to insert at the beginning of the element.
    """
    height = TOP + 2 * PANEL + GAP + BOTTOM
    steps = max(len(curves.score), 1)
    step_ticks = [int(t) for t in nice_ticks(steps, 8) if t == int(t) and t <= steps]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / steps

    lower = TOP + PANEL + GAP
    kl_ticks = nice_ticks(max([*(k for k in curves.kl if math.isfinite(k)), 1.0]), 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curves" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="curves-title curves-text">',
        '<title id="curves-title">Score and KL per step</title>',
        f'<desc id="curves-text">{escape(description(curves))}</desc>',
        head,
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        *panel("Mean P(POSITIVE) of a batch of reviews", TOP, [0, 0.25, 0.5, 0.75, 1]),
        *panel("KL to the reference model, nats per review", lower, kl_ticks),
        *(text(x(t), lower + PANEL + 20, str(t), "tick", "middle") for t in step_ticks),
        text((LEFT + WIDTH - RIGHT) / 2, height - 12, f"PPO step ({curves.batch_size} reviews each)", "note", "middle"),
        *line("score", curves.score, x, lambda value: TOP + PANEL * (1 - value), "{:.2f}"),
        *line("kl", curves.kl, x, lambda value: lower + PANEL * (1 - value / kl_ticks[-1]), "{:.1f}"),
    ]
    held_out_marks = [(s, v) for s, v in zip((0, steps), curves.held_out, strict=True) if v is not None]
    for step, value in held_out_marks:
        parts.append(f'<circle class="mark score" cx="{x(step):.1f}" cy="{TOP + PANEL * (1 - value):.1f}" r="4.5"/>')
    if held_out_marks:
        right = WIDTH - RIGHT
        label = "held-out prompts: " + " → ".join(f"{value:.2f}" for _, value in held_out_marks)
        parts.append(f'<circle class="mark score" cx="{right - 8 - 6.6 * len(label):.1f}" cy="{TOP - 18}" r="4.5"/>')
        parts.append(text(right, TOP - 14, label, "note", "end"))
    return "\n".join(part for part in [*parts, "</svg>"] if part)


def description(curves: Curves) -> str:
    """Describes the plot in words, for screen readers."""
    if not curves.score:
        return "No step was finished."
    return (
        f"Over {len(curves.score)} steps of {curves.batch_size} reviews, the mean P(POSITIVE) of a batch goes from "
        f"{curves.score[0]:.2f} to {curves.score[-1]:.2f}, and the KL to the reference from {curves.kl[0]:.1f} to "
        f"{curves.kl[-1]:.1f} nats per review."
    )


def nice_ticks(highest: float, count: int) -> list[float]:
    """Returns about `count` ticks from 0 to at least `highest`, spaced 1, 2, 2.5 or 5 times a power of ten."""
    rough_step = highest / count
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(multiple * power for multiple in (1, 2, 2.5, 5, 10) if multiple * power >= rough_step * 0.999)
    return [step * i for i in range(math.ceil(highest / step - 1e-9) + 1)]


def panel(title: str, top: float, levels: Sequence[float]) -> list[str]:
    """Draws a panel: its title, and a labelled grid line per level."""
    parts = [text(LEFT - 40, top - 14, title, "title", "start")]
    for level in levels:
        y = top + PANEL * (1 - level / levels[-1])
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 10, y + 4, f"{level:g}", "tick", "end"))
    return parts


def line(name: str, values: Sequence[float], x: Scale, y: Scale, template: str) -> list[str]:
    """Draws a series, labelled with its last finite value; non-finite values leave a gap."""
    pieces: list[list[str]] = [[]]
    last = None
    for step, value in enumerate(values, start=1):
        if math.isfinite(value):
            last = (x(step), y(value), value)
            pieces[-1].append(f"{last[0]:.1f},{last[1]:.1f}")
        elif pieces[-1]:
            pieces.append([])
    parts = [f'<polyline class="line {name}" points="{" ".join(piece)}"/>' for piece in pieces if piece]
    if last is not None:
        parts.append(f'<circle class="dot {name}" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3.5"/>')
        parts.append(text(last[0] + 12, last[1] + 4.5, template.format(last[2]), "value", "start"))
    return parts


def text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    """Draws a line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
