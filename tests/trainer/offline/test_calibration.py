from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.functional.oracles import f64
from trl.functional.preferences import preference_reliability
from trl.trainer.offline.calibration import plot_reliability, reliability_table

LOG_3 = 1.0986122886681098
DIAGRAM = preference_reliability(f64([LOG_3, LOG_3, LOG_3, -LOG_3, 0.1]), bins=10)


def test_table() -> None:
    """σ(log 3) = 0.75, right in three of four; σ(0.1) = 0.525, right."""
    assert reliability_table(DIAGRAM).splitlines() == [
        "| pairs | predicted probability | right |",
        "| ---: | ---: | ---: |",
        "| 1 | 0.525 | 1.000 |",
        "| 4 | 0.750 | 0.750 |",
        "",
        "expected calibration error: 0.095",
    ]


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_reliability(DIAGRAM, tmp_path / "reliability.svg")
    assert "<svg" in (tmp_path / "reliability.svg").read_text()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_reliability needs matplotlib: pip install matplotlib"):
        plot_reliability(DIAGRAM, tmp_path / "reliability.png")
