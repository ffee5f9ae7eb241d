"""Terminal (or log file) output of the demo. Model-generated text is always sanitized first."""

from __future__ import annotations

import textwrap

from trl.demo.outcome import DemoResult, HeldOut
from trl.untrusted import one_line

SHOWN = 6  # prompts in the table on the terminal


def comparison(before: HeldOut, after: HeldOut, width: int) -> str:
    """Formats the first held-out prompts with P(POSITIVE) and responses, before and after training."""
    lines = ["Held-out prompts, before and after (P(POSITIVE), continuation):", ""]
    for before_review, after_review in zip(before.reviews[:SHOWN], after.reviews[:SHOWN], strict=True):
        lines.append(f"  {one_line(before_review.prompt)[: width - 6]} ...")
        for name, review in (("before", before_review), ("after ", after_review)):
            head = f"    {name} {review.positive:.2f}  "
            wrapped = textwrap.wrap(one_line(review.response), max(20, width - len(head) - 1)) or [""]
            lines += [head + wrapped[0], *(" " * len(head) + line for line in wrapped[1:])]
        lines.append("")
    return "\n".join(lines)


def verdict(result: DemoResult) -> str:
    """Summarizes the metrics of a finished run in two lines."""
    before, after = result.before, result.after
    assert before is not None and after is not None
    return (
        f"Mean P(POSITIVE) of {len(before.reviews)} responses to held-out prompts: {before.positive:.2f} before, "
        f"{after.positive:.2f} after {result.steps} steps; KL {after.kl:.1f} nats per review.\n"
        f"Language: perplexity under the reference {before.perplexity:.0f} -> {after.perplexity:.0f}, different word "
        f"pairs {before.distinct_2:.0%} -> {after.distinct_2:.0%}."
    )
