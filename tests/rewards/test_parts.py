from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import assert_close
from tests.rewards.samples import sample, samples
from trl.rewards import FormatReward, LengthPenalty, as_reward, math_reward


def scores(reward: Any, *completions: str) -> list[float | None]:
    return as_reward(reward).score(samples(*completions)).scores


def test_length_worked_by_hand() -> None:
    # Tokens: 1, 2, 3, 5; none off from 2 to 3, then 0.25 each, at most 0.4.
    texts = ("a", "a b", "a b c", "a b c d e")
    assert_close(scores(LengthPenalty(3, shortest=2, per_unit=0.25, most=0.4), *texts), [-0.25, 0.0, 0.0, -0.4])
    assert_close(scores(LengthPenalty(5, per_unit=0.1, unit="character"), "a b c d", "a b"), [-0.2, 0.0])
    assert scores(LengthPenalty(shortest=2), "a b c d e f") == [0.0]


def test_length_counts_the_policys_tokens() -> None:
    batch = [sample("one word", ids=(4, 5, 6, 7))]
    assert_close(as_reward(LengthPenalty(2, per_unit=0.5)).score(batch).scores, [-1.0])


def test_format() -> None:
    tags = r"<think>.*</think>\s*<answer>.*</answer>"
    reward = FormatReward(re.compile(tags, re.DOTALL), bonus=0.5, penalty=1.0, whole=True)
    good, spaced = "<think>a\nb</think><answer>4</answer>", "\n<think></think> <answer></answer>\n"
    assert scores(reward, good, spaced, "so: " + good, "") == [0.5, 0.5, -1.0, -1.0]
    assert scores(FormatReward(r"\d"), "a1b", "ab", "1" * 100_001) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: LengthPenalty(2, shortest=3), "must be at least 0 and at most longest="),
        (lambda: LengthPenalty(2, per_unit=-1), "per_unit=-1"),
        (lambda: LengthPenalty(2, most=float("nan")), "most=nan"),
        (lambda: LengthPenalty(2, unit="word"), "unit='word'"),  # type: ignore[arg-type]
        (lambda: FormatReward("("), "not a valid regular expression"),
        (lambda: FormatReward("a", penalty=-1.0), "penalty=-1.0"),
    ],
)
def test_bad_settings(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


class FakeMath:
    """`math_verify` as far as it is used: reads `\\boxed{n}`, `$n$` and whole numbers; timeouts are alarms."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def parse(self, text: str, **options: Any) -> list[Any]:
        self.calls.append(("parse", options))
        found = re.search(r"\\boxed\{(\d+)\}|^\$\\text\{n\} = (\d+)\$$|^(\d+)$", text)
        return [int(next(filter(None, found.groups())))] if found else []

    def verify(self, gold: Any, target: Any, **options: Any) -> bool:
        self.calls.append(("verify", options))
        return gold == target


def test_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMath()
    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(parse=fake.parse, verify=fake.verify))
    batch = [
        sample(r"so \boxed{4}", answer="4"),
        sample(r"so \boxed{5}", answer="4"),
        sample("no idea", answer="4"),
        sample(r"so \boxed{4}", answer=r"\text{n} = 4"),
        sample(r"so \boxed{4}", answer="unreadable"),
    ]
    assert as_reward(math_reward).score(batch).scores == [1.0, 0.0, 0.0, 1.0, None]
    assert all(options == {} for _, options in fake.calls)
    fake.calls.clear()
    # An alarm can be set on the main thread alone.
    assert as_reward(math_reward, isolation="thread", timeout=30).score(batch[:1]).scores == [1.0]
    assert fake.calls == [("parse", {"parsing_timeout": None})] * 2 + [("verify", {"timeout_seconds": None})]


def test_mathematics_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(RuntimeError, match=r"pip install math-verify"):
        as_reward(math_reward).score([sample("a", answer="4")])
