from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.rewards.samples import sample, samples
from tests.rewards.service import ok, serving
from trl.rewards import JudgeReward, as_reward
from trl.rewards.failures import ColumnError
from trl.rewards.judge import last_score


def reply(text: Any) -> Any:
    return ok({"id": "x", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": {}})


def by_length(body: Any) -> Any:
    """Scores by the length of what stands between the tags."""
    text = body["messages"][0]["content"].partition("<reply>\n")[2].partition("\n</reply>")[0]
    return reply(f"Fair.\nScore: {len(text)}")


def judged(url: str, batch: Any, **settings: Any) -> Any:
    return as_reward(JudgeReward(url + "/v1", "judge-1", **settings), on_error="skip").score(batch)


def test_what_is_asked_and_what_comes_back() -> None:
    with serving(by_length) as service:
        scored = judged(service.url, [sample("four", prompt="say it")], max_tokens=99)
    assert scored.scores == [4.0] and scored.components == {"JudgeReward": [4.0]}
    ((_, path, _, body),) = service.requests
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0, 99)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert "<request>\nsay it\n</request>" in message["content"] and "<reply>\nfour\n</reply>" in message["content"]


def test_order_and_concurrency() -> None:
    together = threading.Barrier(3, timeout=20)

    def slow(body: Any) -> Any:
        together.wait()
        return by_length(body)

    with serving(slow) as service:
        assert judged(service.url, samples("a", "bb", "ccc"), concurrency=3).scores == [1.0, 2.0, 3.0]


def test_equal_messages_are_asked_once(tmp_path: Path) -> None:
    with serving(by_length) as service:
        judge = JudgeReward(service.url, "m", cache=tmp_path / "judge.jsonl")
        assert as_reward(judge).score(samples("one", "four", "one")).scores == [3.0, 4.0, 3.0]
        assert as_reward(judge).score(samples("four")).scores == [4.0]
        assert len(service.requests) == 2
        again = JudgeReward(service.url, "m", cache=tmp_path / "judge.jsonl")
        assert as_reward(again).score(samples("one")).scores == [3.0]
        assert len(service.requests) == 2
        other = JudgeReward(service.url, "another", cache=tmp_path / "judge.jsonl")
        as_reward(other).score(samples("one"))  # another judge is another opinion
        assert len(service.requests) == 3
        off = JudgeReward(service.url, "m", cache=False)
        for _ in range(2):
            as_reward(off).score(samples("one", "one"))
        assert len(service.requests) == 5


def test_failures_are_of_their_rows_and_are_not_cached() -> None:
    answers = iter([reply("no idea"), reply("Score: 11"), reply(None), ok({}), (500, {}, {})])
    with serving(lambda body: next(answers, reply("Score: 7"))) as service:
        judge = as_reward(JudgeReward(service.url, "m", concurrency=1), on_error="skip")
        batch = samples("a", "b", "c", "d", "e", "f")
        scored = judge.score(batch)
        assert scored.scores == [None] * 5 + [7.0]
        said = [
            "contains no score: 'no idea'",
            "11.0 is outside scale=(0.0, 10.0)",
            "no choices[0]",
            "no choices[0]",
            "500",
            None,
        ]
        assert all((error is None) if text is None else (text in error) for text, error in zip(said, scored.errors))
        assert judge.score(batch).scores == [7.0] * 6


def test_braces_in_texts_are_text() -> None:
    template = "{rubric} | {prompt} | {completion} | {{x}}"
    with serving(lambda body: reply("Score: 1")) as service:
        batch = [sample("{prompt} {rubric} {0}", prompt="{completion}", rubric="be strict", x="X")]
        assert judged(service.url, batch, template=template).scores == [1.0]
    assert service.bodies[0]["messages"][0]["content"] == "be strict | {completion} | {prompt} {rubric} {0} | {X}"


def test_a_column_that_the_template_names() -> None:
    with pytest.raises(ColumnError, match="'rubric'"):
        judged("http://127.0.0.1:9", samples("a"), template="{rubric} {completion}")


@pytest.mark.parametrize(
    ("text", "score"),
    [("Score: 7", 7), ("score = 7.5", 7.5), ("**Score:** 3", 3), ("Score: 1, no, wait.\nScore: **-2**", -2)],
)
def test_scores_in_replies(text: str, score: float) -> None:
    assert last_score(text) == score


def test_own_parser_and_scale() -> None:
    with serving(lambda body: reply("A")) as service:
        assert judged(service.url, samples("a"), parse={"A": 1.0}.__getitem__, scale=(0, 1)).scores == [1.0]


def test_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CANARY_API_KEY", "sk-canary-42")
    with serving(by_length) as service:
        judge = JudgeReward(service.url, "m", key_env="CANARY_API_KEY", cache=tmp_path / "judge.jsonl")
        as_reward(judge).score(samples("one"))
    assert service.requests[0][2]["Authorization"] == "Bearer sk-canary-42"
    with serving(lambda body: reply("your key is sk-canary-42")) as service:
        scored = judged(service.url, samples("one"), key_env="CANARY_API_KEY")
    assert scored.errors == [
        "Refused: the answer contains the API key in CANARY_API_KEY, which must not reach logs or files"
    ]
    assert "sk-canary-42" not in repr(scored)
    assert "sk-canary-42" not in repr(vars(judge)) + (tmp_path / "judge.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"template": "{prompt}"}, "no {completion}"),
        ({"scale": (1, 1)}, "scale="),
        ({"concurrency": 0}, "concurrency=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"timeout": -1}, "timeout=-1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        JudgeReward("https://host/v1", "m", **settings)
