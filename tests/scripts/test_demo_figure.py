"""The demo's picture of the README, from made-up numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


figure = load("demo_figure")
Curves, DARK, LIGHT, nice_ticks, standalone = (
    figure.Curves, figure.DARK, figure.LIGHT, figure.nice_ticks, figure.standalone
)  # fmt: skip


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
