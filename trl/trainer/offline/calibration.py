"""How far a reward model's certainty can be trusted: its reliability diagram as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl.functional.preferences import Reliability


def reliability_table(diagram: Reliability) -> str:
    """Returns a Markdown table with a row for each filled bin, and the expected calibration error under it."""
    lines = ["| pairs | predicted probability | right |", "| ---: | ---: | ---: |"]
    bins = zip(diagram.count.tolist(), diagram.confidence.tolist(), diagram.frequency.tolist(), strict=True)
    lines += [f"| {count} | {sure:.3f} | {right:.3f} |" for count, sure, right in bins if count]
    return "\n".join([*lines, "", f"expected calibration error: {float(diagram.error):.3f}"])


def plot_reliability(diagram: Reliability, path: str | Path) -> None:
    """Draws a reliability diagram: the share of right predictions over the predicted probability.

    A calibrated model's points are on the diagonal; below it, the model is too sure.

    Args:
        diagram: from `RewardTrainer.calibration`.
        path: the picture; its suffix says the format, such as .png or .svg.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_reliability needs matplotlib: pip install matplotlib") from error
    figure: Any = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted probability", ylabel="share of right predictions")
    filled = diagram.count > 0
    share = diagram.count[filled] / diagram.count.sum()
    axes.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1)
    axes.scatter(diagram.confidence[filled], diagram.frequency[filled], s=20 + 400 * share)
    axes.set_title(f"expected calibration error {float(diagram.error):.3f}")
    figure.savefig(path)
