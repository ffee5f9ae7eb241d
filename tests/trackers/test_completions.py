"""Tables of completions for trackers, with secrets redacted and markup escaped."""

from __future__ import annotations

from trl.trackers import CompletionRecord
from trl.trackers.completions import completions_table, records_table

COLUMNS = ["query", "response", "reward"]
ROWS = [["say", "a|b\n<b>c</b>", 0.123456], ["key", "hf_abcdefghijklmnop1234", -2.0]]


def test_secrets_are_redacted_and_the_rest_stays() -> None:
    table = completions_table(tuple(COLUMNS), ROWS)
    assert table.columns == COLUMNS
    assert table.rows == [ROWS[0], ["key", "[redacted]", -2.0]]
    assert ROWS[1][1] == "hf_abcdefghijklmnop1234"


def test_markdown_is_escaped() -> None:
    assert completions_table(COLUMNS, ROWS).markdown() == (
        "| query | response | reward |\n"
        "| --- | --- | --- |\n"
        "| say | a&#124;b &lt;b&gt;c&lt;/b&gt; | 0.1235 |\n"
        "| key | [redacted] | -2 |"
    )


def record(number: int, **rewards: float | None) -> CompletionRecord:
    return CompletionRecord(
        prompt_id=str(number), prompt=f"p{number}", completion=f"c{number}", rewards=rewards, score=0.5, length=3
    )


def test_samples_of_a_step() -> None:
    table = records_table([record(n, kind=1.0) for n in range(5)], limit=2)
    assert table.columns == ["prompt", "completion", "score", "kl", "length"]
    assert table.rows == [["p0", "c0", 0.5, None, 3], ["p1", "c1", 0.5, None, 3]]
    assert table.markdown().splitlines()[2] == "| p0 | c0 | 0.5 |  | 3 |"


def test_several_rewards_are_shown_by_name() -> None:
    table = records_table([record(0, kind=1.0, short=None)], limit=8)
    assert table.columns == ["prompt", "completion", "reward/kind", "reward/short", "score", "kl", "length"]
    assert table.rows == [["p0", "c0", 1.0, None, 0.5, None, 3]]
