"""What the demo prints, from made-up numbers: no model is needed."""

from __future__ import annotations

import pytest

from tests.report.hostile import TEXTS
from trl.demo.outcome import DemoResult, DemoSettings, HeldOut, Review
from trl.demo.terminal import comparison, verdict


def held_out(positive: float, texts: list[str]) -> HeldOut:
    reviews = [Review(prompt=text, response=text, positive=positive) for text in texts]
    return HeldOut(reviews=reviews, positive=positive, kl=8.0, perplexity=40.0, distinct_2=0.8)


def test_comparison_keeps_to_the_width_and_is_printable() -> None:
    for start in range(0, len(TEXTS) - 6, 6):
        texts = TEXTS[start : start + 6]
        text = comparison(held_out(0.4, texts), held_out(0.9, texts), 80)
        assert max(map(len, text.splitlines())) <= 80
        assert all(line.isprintable() for line in text.splitlines())
        assert "before 0.40" in text and "after  0.90" in text


def test_verdict_says_what_was_reached() -> None:
    result = DemoResult(
        settings=DemoSettings(), steps=3, before=held_out(0.49, ["a"]), after=held_out(0.93, ["a"]), seconds=71.0
    )
    assert "0.49 before, 0.93 after 3 steps; KL 8.0 nats" in verdict(result)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": 0}, "steps=0"), ({"batch_size": 10}, "batch_size=10 is not a multiple of minibatches=4")],
)
def test_settings_that_cannot_be(wrong: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**wrong)
