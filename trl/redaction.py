"""Redacts secrets from everything that is written out: settings, logs, run records and tracker rows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|AUTH|PAT|JWT|BEARER|COOKIES?)$|_PWD$|API_?KEYS?$|WEBHOOK|CONNECTION_STRING"
    r"|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTHORIZATION"
    r"|(?:ACCESS|ACCOUNT|AUTH|CLIENT|DEPLOY|ENCRYPTION|LICENSE|MASTER|PRIVATE|SERVICE|SESSION|SIGNING|SSH|SUBSCRIPTION)"
    r"_?KEY"
    r"|(?:DB|HTTP|MAIL|PROXY|SMTP|USER)_?PASS$"
)
# Names that end in `_TOKEN` but are not secrets: a tokenizer's special tokens and per-token statistics.
_TEXT_TOKEN = re.compile(
    r"(?:^|_)(?:PAD|EOS|BOS|UNK|SEP|CLS|MASK|IMAGE|AUDIO|VIDEO|STOP|START|END|FIRST|LAST|NEXT|PER|EACH)_TOKEN$"
)
# Every repetition is bounded, or cannot start inside another, so matching takes linear time even on megabytes of text.
_SECRET_TEXT = (
    # user:password in a URL; the password may contain an @
    (re.compile(r"(://)[^/\s?#\"'<>]*@"), rf"\1{REDACTED}@"),
    # ?token=... in a URL, NAME_API_KEY=... in a shell, and headers
    (re.compile(r"(?i)([?&](?:[\w-]{0,32}(?:token|key|secret|password)|sig|signature)=)[^&\s#\"']+"), rf"\1{REDACTED}"),
    (re.compile(r"([A-Z0-9]_(?:TOKEN|API_KEY|SECRET|PASSWORD)=)[^\s\"']+"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)(\bauthorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?)[^\r\n\"']+"), rf"\1{REDACTED}"),
    (re.compile(r"(?i)(\bbearer\s{1,4})[\w.~+/=-]{20,}"), rf"\1{REDACTED}"),
    # API key formats of well-known services.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
            r"|AKIA[A-Z0-9]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{16,}|eyJ[\w-]{16,}\.eyJ[\w-]{16,}\.[\w-]{16,})"
        ),
        REDACTED,
    ),
)
# Values of flags, which would otherwise be redacted from every text.
_NO_SECRET = {"true", "false", "none", "null"}
_URL_PASSWORD = re.compile(r"://(?:[^/\s?#\"'<>:@]*:)?([^/\s?#\"'<>]+)@")
# Secrets found in settings; global to the process, like those of its environment.
_remembered: set[str] = set()


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a setting or environment variable with this name, in any case style, holds a secret.

    True for `HF_TOKEN`, `*_TOKEN`, `token`, `*_API_KEY`, `apiKey`, `*_SECRET`, `*PASSWORD*`, `AWS_SECRET_ACCESS_KEY`,
    `Authorization`, `cookie` and the like; False for `pad_token`, `max_new_tokens`, `kl_per_token`.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name).upper()
    return bool(_SECRET_NAME.search(words)) and not _TEXT_TOKEN.search(words)


def redact(value: Any) -> Any:
    """Returns a copy of `value` with secrets replaced by `[redacted]`.

    Secrets are:

    - mapping values under a secret name (see `is_secret_name`);
    - values of environment variables with such a name, and those passed to `remember_secrets`, wherever they occur in
      text (only as whole words if 4 to 7 characters long; shorter ones are ignored);
    - user and password of a URL, and keys in its query;
    - anything after `Bearer`, and anything in a known service's key format.

    Args:
        value: text, bytes, paths, and mappings, lists, tuples and sets of them at any depth. Anything else is returned
            unchanged.

    Returns:
        A copy in which mappings are dicts; `value` itself is not modified.
    """
    return _redact(value, _text_redactor())


def remember_secrets(settings: Any) -> None:
    """Registers the secrets in `settings`, so that `redact` removes them from any later text, such as an error message.

    Args:
        settings: mappings, lists, tuples and sets at any depth. Secrets are strings under a secret name and passwords
            in URLs, of at least 8 characters.
    """
    _remembered.update(secret for secret in _secrets_of(settings) if len(secret) >= 8)


def _secrets_of(value: Any, secret: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        yield from (value.strip(),) if secret else _URL_PASSWORD.findall(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets_of(item, secret or _names_secret(key))
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _secrets_of(item, secret)


def _redact(value: Any, clean: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return clean(value.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    if isinstance(value, PurePath):
        return type(value)(clean(str(value)))
    if isinstance(value, Mapping):
        return {
            _redact(key, clean): _hide(item, key) if _names_secret(key) else _redact(item, clean)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        kind = type(value) if type(value) in (list, tuple, set, frozenset) else list
        return kind(_redact(item, clean) for item in value)
    return value


def _names_secret(key: Any) -> bool:
    return isinstance(key, str) and is_secret_name(key)


def _hide(value: Any, name: str) -> Any:
    """Redacts the value of a secret name, except None, bools, floats, and ints whose name ends in "token" (counts)."""
    is_count = isinstance(value, int) and name.upper().endswith("TOKEN")
    return value if value is None or isinstance(value, bool | float) or is_count else REDACTED


def _spellings(secret: str) -> tuple[str, ...]:
    """A secret's spellings: verbatim, in a URL, in a repr and in JSON."""
    return secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1], json.dumps(secret)[1:-1]


def _text_redactor() -> Callable[[str], str]:
    """Returns a function that redacts a text, using the current environment's secrets."""
    values = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    values = {value for value in values | _remembered if len(value) >= 4 and value.lower() not in _NO_SECRET}
    # Longest first, since one secret may be a prefix of another.
    forms = sorted({form for value in values for form in _spellings(value)}, key=len, reverse=True)
    patterns = [re.escape(form) if len(form) >= 8 else rf"(?<!\w){re.escape(form)}(?!\w)" for form in forms]
    known = re.compile("|".join(patterns)) if patterns else None

    def clean(text: str) -> str:
        if known is not None:
            text = known.sub(REDACTED, text)
        for pattern, replacement in _SECRET_TEXT:
            text = pattern.sub(replacement, text)
        return text

    return clean
