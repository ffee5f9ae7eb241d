"""Terminal (or log file) output of the demo. Model-generated text is always sanitized first."""

from __future__ import annotations

import re
import shutil
import textwrap
import time
import unicodedata
from typing import TextIO

from trl.demo.outcome import DemoResult, HeldOut, StepRow

SHOWN = 6  # prompts in the table on the terminal
_LONGEST = 2000  # maximum characters shown of one text
_SEQUENCES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?")


def plain(text: str) -> str:
    """Returns `text` on one line, without escape sequences, control characters and bidirectional marks."""
    text = _SEQUENCES.sub("", text[:_LONGEST])
    text = " ".join(text.split())
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))


def clock(seconds: float) -> str:
    """Formats seconds as minutes and seconds: 0:07."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """Progress display: one line updated in place on a terminal, or a line per step otherwise."""

    def __init__(self, stream: TextIO, steps: int, batch_size: int) -> None:
        self.stream = stream
        self.steps = steps
        self.batch_size = batch_size
        self.live = stream.isatty()
        self.started = time.perf_counter()
        self.width = 0

    def update(self, row: StepRow) -> None:
        """Shows the metrics of a step and the estimated time left."""
        per_step = (time.perf_counter() - self.started) / row.step
        text = (
            f"step {row.step:>{len(str(self.steps))}}/{self.steps}  P(POSITIVE) {row.positive:.2f}  KL {row.kl:5.2f}  "
            f"{self.batch_size / per_step:.0f} samples/s  ETA {clock(per_step * (self.steps - row.step))}"
        )
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the progress line."""
        if self.live and self.width:
            self.stream.write("\n")
            self.stream.flush()
            self.width = 0


def comparison(before: HeldOut, after: HeldOut, width: int) -> str:
    """Formats the first held-out prompts with P(POSITIVE) and responses, before and after training."""
    lines = ["Held-out prompts, before and after (P(POSITIVE), continuation):", ""]
    for before_review, after_review in zip(before.reviews[:SHOWN], after.reviews[:SHOWN], strict=True):
        lines.append(f"  {plain(before_review.prompt)} ...")
        for name, review in (("before", before_review), ("after ", after_review)):
            head = f"    {name} {review.positive:.2f}  "
            wrapped = textwrap.wrap(plain(review.response), max(20, width - len(head) - 1)) or [""]
            lines += [head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])]
        lines.append("")
    return "\n".join(lines)


def verdict(result: DemoResult) -> str:
    """Summarizes the metrics of a finished run in two lines."""
    before, after = result.before, result.after
    assert before is not None and after is not None
    return (
        f"Mean P(POSITIVE) on {len(before.reviews)} held-out prompts: {before.positive:.2f} before, {after.positive:.2f} "
        f"after {len(result.rows)} steps; KL {after.kl:.1f} nats per review.\n"
        f"Readability: perplexity under the reference {before.perplexity:.0f} -> {after.perplexity:.0f}, different word pairs "
        f"{before.distinct_2:.0%} -> {after.distinct_2:.0%}."
    )
