from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from trl.redaction import REDACTED, is_secret_name, redact, remember_secrets


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "hf_token", "token", "hub-token", "OPENAI_API_KEY", "apiKey", "x-api-key", "accessToken",
        "CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "password", "PASSWORD_2", "Authorization", "private_key",
        "openaiapikey", "API_KEYS", "auth", "session_cookie", "GITHUB_PAT", "SMTP_PASS", "DB_PWD", "SSH_KEY", "signing-key",
        "SLACK_WEBHOOK_URL", "tracker_kwargs/wandb/api_key", "AZURE_STORAGE_CONNECTION_STRING",
    ],
)  # fmt: skip
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "pad_token", "eos_token", "tokens", "max_new_tokens", "stop_token_ids", "kl_per_token", "tokenizer", "key", "seed",
        "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "monkey", "tokens/responses_len_mean",
        "PWD", "OLDPWD", "author", "path", "compass", "time/forward_pass", "keep_memory", "monkey_key",
    ],
)  # fmt: skip
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


def test_what_stands_under_a_secret_name() -> None:
    value = {"hub": [{"token": "abc", "repo": "me/it"}], "password": 1234, "api_key": {"a": "b"}, "pad_token": "<pad>"}
    assert redact(value) == {
        "hub": [{"token": REDACTED, "repo": "me/it"}],
        "password": REDACTED,
        "api_key": REDACTED,
        "pad_token": "<pad>",
    }
    # Nothing is given away by a switch, and these are statistics.
    numbers: dict[str, Any] = {"use_token": True, "token": None, "loss/token": 3, "password_score": 0.5}
    assert redact(numbers) == numbers


def test_values_of_the_environment_wherever_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-1/é+")
    monkeypatch.setenv("DB_PASSWORD", "canary-1/é+longer")
    monkeypatch.setenv("MY_SECRET", "tree")
    monkeypatch.setenv("USE_TOKEN", "true")
    monkeypatch.setenv("OTHER_TOKEN", "abc")
    assert redact("x canary-1/é+ y canary-1/é+longer z") == f"x {REDACTED} y {REDACTED} z"
    assert redact("?q=canary-1%2F%C3%A9%2B") == f"?q={REDACTED}"
    # A short one as a whole word; switches and shorter ones would take words out of every text.
    assert redact("tree, streets, true, abc") == f"{REDACTED}, streets, true, abc"
    assert redact({"a canary-1/é+": (b"canary-1/\xc3\xa9+\xff", Path("/x/canary-1/é+"), {"tree"})}) == {
        f"a {REDACTED}": (REDACTED.encode() + b"\xff", Path(f"/x/{REDACTED}"), {REDACTED})
    }
    monkeypatch.setenv("HF_TOKEN", "another-value")
    assert redact("another-value") == REDACTED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:p@ss@host:8/x", f"http://{REDACTED}@host:8/x"),
        ("postgres://me@host", f"postgres://{REDACTED}@host"),
        ("https://host/@me and a@b.c", "https://host/@me and a@b.c"),
        ("https://h/x?a=1&api_key=abc&b=2#c", f"https://h/x?a=1&api_key={REDACTED}&b=2#c"),
        ("https://h/x?access_token=abc", f"https://h/x?access_token={REDACTED}"),
        ("run with OPENAI_API_KEY=abc now", f"run with OPENAI_API_KEY={REDACTED} now"),
        ("Authorization: Basic YTpi", f"Authorization: {REDACTED}"),
        ("{'authorization': 'Bearer ab'}", f"{{'authorization': '{REDACTED}'}}"),
        ("curl -H 'Bearer abcdefghij0123456789'", f"curl -H 'Bearer {REDACTED}'"),
        ("hf_abcdefghijklmnopqrst", REDACTED),
        ("sk-proj-abcdefghijklmnop", REDACTED),
        ("github_pat_11ABCDEFG0abcdefghij", REDACTED),
        ("glpat-abcdefghij0123456789 and AKIAABCDEFGHIJKLMNOP", f"{REDACTED} and {REDACTED}"),
        (
            "x=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
            f"x={REDACTED}",
        ),
        ("the bearer of bad news", "the bearer of bad news"),
        ("Basic understanding; f(token=t, password=p)", "Basic understanding; f(token=t, password=p)"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_spellings_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY", "begin\n'a/b' é\tend")
    for text in (
        "begin\n'a/b' é\tend",
        str(["begin\n'a/b' é\tend"])[2:-2],
        r"begin\n'a/b' \u00e9\tend",
        "begin%0A%27a/b%27%20%C3%A9%09end",
    ):
        assert redact(f"x {text} y") == f"x {REDACTED} y", text


def test_remembered_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.redaction._remembered", set())
    remember_secrets(
        {
            "hub": [{"token": "first-canary", "repo_id": "me/repository"}],
            "credentials": {"user": {"id": "second-canary"}},
            "url": "https://me:third@canary@host/path-of-it and https://fourth-canary@host",
            "auth": ("fifth-canary", 12345678, None),
            "password": "short",
        }
    )
    text = "first-canary, second-canary, third@canary, fourth-canary, fifth-canary"
    assert redact(text) == ", ".join([REDACTED] * 5)
    assert (
        redact("me/repository at host, short, path-of-it, 12345678")
        == "me/repository at host, short, path-of-it, 12345678"
    )


def test_other_things_are_returned_as_they_are() -> None:
    thing = object()
    original = {"a": [thing], "token": "x"}
    assert redact(original)["a"][0] is thing
    assert original["token"] == "x"
    assert redact(3.5) == 3.5 and redact(None) is None and redact((1, "a")) == (1, "a")


@pytest.mark.parametrize("piece", ["a", "A_", "://", "://a", "?a", "?token", "authorization: ", "bearer ", "sk-", "@"])
def test_a_long_text_takes_time_in_proportion(piece: str) -> None:
    started = time.perf_counter()
    redact(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - started < 2.0
