"""S11: a remote reward goes where the operator said, and believes nothing but numbers."""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.rewards.samples import sample, samples
from tests.rewards.service import ok, serving
from trl.rewards import RemoteReward, as_reward
from trl.rewards.failures import ColumnError
from trl.rewards.web import Refused, check_address

BATCH = [sample("good", prompt="p", url="http://169.254.169.254/"), sample("bad", prompt="q", url="file:///etc/passwd")]


def asked(url: str, batch: Any = BATCH, **settings: Any) -> Any:
    return as_reward(RemoteReward(url, **settings), on_error="skip").score(batch)


def lengths(body: Any) -> Any:
    return ok({"scores": [len(row["completion"]) for row in body["samples"]]})


def test_what_is_sent_and_what_comes_back() -> None:
    with serving(lengths) as service:
        scored = asked(service.url + "/score?v=1", columns=["url"])
    assert scored.scores == [4.0, 3.0] and scored.errors == [None, None]
    ((method, path, headers, body),) = service.requests
    assert (method, path) == ("POST", "/score?v=1")
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers
    assert headers["Host"] == service.url.removeprefix("http://")
    assert body["samples"][0] == {"prompt": "p", "completion": "good", "columns": {"url": "http://169.254.169.254/"}}


def test_columns_are_not_sent_unless_named() -> None:
    with serving(lengths) as service:
        asked(service.url)
        with pytest.raises(ColumnError, match="'answer'"):
            asked(service.url, columns=["answer"])
    assert [row["columns"] for row in service.bodies[0]["samples"]] == [{}, {}]


def test_requests_are_cut_and_kept_in_order() -> None:
    with serving(lengths) as service:
        scored = asked(service.url, samples("a", "bb", "ccc", "dddd", "eeeee"), rows_per_request=2, concurrency=3)
    assert scored.scores == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(len(body["samples"]) for body in service.bodies) == [1, 2, 2]


def test_a_request_that_fails_is_a_failure_of_its_rows_alone() -> None:
    def picky(body: Any) -> Any:
        return lengths(body) if body["samples"][0]["completion"] != "bb" else (500, {}, {})

    with serving(picky) as service:
        scored = asked(service.url, samples("a", "bb", "ccc"), rows_per_request=1)
    assert scored.scores == [1.0, None, 3.0]
    assert scored.errors == [None, "Refused: the service answered 500 Internal Server Error; expected 200", None]


def test_null_is_unscorable() -> None:
    with serving(lambda body: ok({"scores": [None, 2]})) as service:
        scored = asked(service.url)
    assert scored.scores == [None, 2.0] and scored.errors == [None, None]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"scores": [1.0]}, "has 1 scores for 2 samples"),
        ({"scores": [1.0, "2.0"]}, "score 1 of the answer is of type str"),
        ({"scores": [1.0, True]}, "score 1 of the answer is of type bool"),
        ({"scores": [1.0, [2.0]]}, "score 1 of the answer is of type list"),
        ({"scores": {"0": 1.0}}, "is not of the form"),
        ({"scores": [1.0, 2.0], "next": "http://elsewhere"}, "is not of the form"),
        ([1.0, 2.0], "is not of the form"),
        (b'{"scores": [1.0, NaN]}', "is not JSON: NaN is not a number"),
        (b'{"scores": [1.0, -Infinity]}', "is not JSON: -Infinity is not a number"),
        (b'{"scores": [1.0, 1e999]}', "score 1 of the answer is not a finite number"),
        (b'{"scores": [1.0, 1' + b"0" * 400 + b"]}", "score 1 of the answer is not a finite number"),
        (b'{"scores": [1.0, ' + b"1" * 5000 + b"]}", "is not"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_schema(answer: Any, said: str) -> None:
    with serving(lambda body: ok(answer)) as service:
        scored = asked(service.url)
    assert scored.scores == [None, None]
    assert scored.errors[0] == scored.errors[1] and said in scored.errors[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with serving(lengths) as other, serving(lambda body: (status, {"Location": other.url}, {})) as service:
        scored = asked(service.url)
    assert "redirects are not followed" in scored.errors[0]
    assert other.requests == [] and len(service.requests) == 1


@pytest.mark.parametrize("length", [{}, {"Content-Length": "5"}])
def test_size_cap(length: dict[str, str]) -> None:
    with serving(lambda body: (200, {}, b" " * 5000)) as service:
        assert "longer than most_bytes=1000" in asked(service.url, most_bytes=1000).errors[0]


def test_chunks_without_end_are_cut_off() -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")

    with speaking(endless) as url:
        assert "longer than most_bytes=100000" in asked(url, most_bytes=100_000).errors[0]


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"])
def test_time_cap_holds_against_a_drip(start: bytes) -> None:
    """A byte now and then keeps a socket's own timeout from ever passing: the cap is on the whole."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b"X")
            time.sleep(0.02)

    with speaking(drip) as url:
        started = time.monotonic()
        scored = asked(url, timeout=0.3)
        assert time.monotonic() - started < 1.3
    assert (
        scored.errors[0] == "TimeoutError: the call took longer than its timeout of 0.3 s"
        or "timeout" in scored.errors[0]
    )
    deadline = time.monotonic() + 5
    while any(thread.name == "reward" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "reward" for thread in threading.enumerate())  # nothing goes on behind


def test_an_answer_that_ends_early() -> None:
    def short(connection: socket.socket) -> None:
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"scores": [1, 2]}')
        connection.shutdown(socket.SHUT_RDWR)

    with speaking(short) as url:
        assert "ended early" in asked(url).errors[0]


def test_a_compressed_answer_is_refused() -> None:
    with serving(lambda body: (200, {"Content-Encoding": "gzip"}, b"bomb")) as service:
        assert "is compressed" in asked(service.url).errors[0]


def test_busy_services_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("trl.rewards.web.time.sleep", waits.append)
    answers = iter([(503, {}, {}), (429, {}, {}), ok({"scores": [1, 2]})])
    with serving(lambda body: next(answers)) as service:
        assert asked(service.url, retries=2).scores == [1.0, 2.0]
    assert waits == [0.5, 1.0]
    with serving(lambda body: (503, {}, {})) as service:
        assert "answered 503" in asked(service.url, retries=1).errors[0]
        assert len(service.requests) == 2
    with serving(lambda body: (400, {}, {})) as service:
        assert "answered 400" in asked(service.url, retries=3).errors[0]
        assert len(service.requests) == 1  # asking again would not help


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host/",
        "gopher://host/",
        "data:,x",
        "javascript:1",
        "//host/",
        "host/path",
        "",
        "HTTP:",
    ],
)
def test_schemes(url: str) -> None:
    with pytest.raises(ValueError, match="url="):
        RemoteReward(url)


def test_schemes_can_be_fewer_and_never_more() -> None:
    with pytest.raises(ValueError, match="allowed are https"):
        RemoteReward("http://127.0.0.1/", schemes=["https"])
    with pytest.raises(ValueError, match="scheme 'ftp'"):
        RemoteReward("ftp://127.0.0.1/", schemes=["ftp"])


@pytest.mark.parametrize(
    "url", ["http://user:sesame@host/", "http://host/#x", "http://host/\r\nX: y", "http://ho st/", "http://host:99999/"]
)
def test_strange_urls(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        RemoteReward(url)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254", "169.254.0.1", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
        "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255",
        "::ffff:0.0.0.0",
    ],
)  # fmt: skip
def test_addresses_that_are_refused(address: str) -> None:
    with pytest.raises(Refused):
        check_address(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.0.0.7", "192.168.1.1", "8.8.8.8", "2001:4860:4860::8888"])
def test_addresses_that_are_not(address: str) -> None:
    check_address(ipaddress.ip_address(address))


def test_link_local_only_if_allowed() -> None:
    check_address(ipaddress.ip_address("169.254.1.1"), allow_link_local=True)
    scored = asked("http://169.254.169.254/latest/meta-data", timeout=5)
    assert "is link-local or a cloud metadata service" in scored.errors[0]
    for spelled in ("http://2852039166/", "http://0xa9fea9fe/", "http://[::ffff:169.254.169.254]/"):
        assert "Refused" in asked(spelled, timeout=5).errors[0]


def names(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Has the name `service.test` resolve to one of `answers` after the other; returns the names looked up."""
    real, left, looked_up = socket.getaddrinfo, list(answers), []

    def lookup(host: Any, port: Any, *rest: Any, **settings: Any) -> Any:
        if host != "service.test":
            return real(host, port, *rest, **settings)
        looked_up.append(host)
        found = left.pop(0) if len(left) > 1 else left[0]
        return [entry for address in found for entry in real(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return looked_up


def test_a_name_that_is_bound_anew_after_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = names(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
    with serving(lengths) as service:
        port = service.url.rpartition(":")[2]
        assert asked(f"http://service.test:{port}/").scores == [4.0, 3.0]
        assert looked_up == ["service.test"]  # one look-up; the connection went where it said
        assert service.requests[0][2]["Host"] == f"service.test:{port}"
        assert "link-local" in asked(f"http://service.test:{port}/").errors[0]  # what it says now
    assert len(service.requests) == 1


def test_one_bad_address_among_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["127.0.0.1", "169.254.169.254"])
    with serving(lengths) as service:
        assert "link-local" in asked(f"http://service.test:{service.url.rpartition(':')[2]}/").errors[0]
        assert service.requests == []


def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, ["127.1.2.3", "127.0.0.1"])  # nobody listens at the first
    with serving(lengths) as service:
        assert asked(f"http://service.test:{service.url.rpartition(':')[2]}/").scores == [4.0, 3.0]


def test_a_proxy_in_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(lengths) as service:
        assert asked(service.url).scores == [4.0, 3.0]


def test_https_checks_the_name_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lengths) as service:
        port = service.url.rpartition(":")[2]
        scored = asked(f"https://127.0.0.1:{port}/", timeout=5)
        assert scored.scores == [None, None] and service.requests == []
        wrapped: list[str] = []

        class Context(ssl.SSLContext):
            def wrap_socket(self, sock: socket.socket, server_hostname: str) -> socket.socket:  # type: ignore[override]
                wrapped.append(server_hostname)
                assert self.check_hostname and self.verify_mode is ssl.CERT_REQUIRED
                return sock

        monkeypatch.setattr(ssl, "create_default_context", lambda: Context(ssl.PROTOCOL_TLS_CLIENT))
        names(monkeypatch, ["127.0.0.1"])
        assert asked(f"https://service.test:{port}/").scores == [4.0, 3.0]
    assert wrapped == ["service.test"]


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sk-canary-0123456789"

    def echo(body: Any) -> Any:
        return 200, {"X-Echo": key}, {"scores": [1.0, key]}

    with serving(lengths) as service:
        reward = RemoteReward(service.url, key_env="CANARY_API_KEY")
        assert "CANARY_API_KEY is unset or empty" in as_reward(reward, on_error="skip").score(BATCH).errors[0]
        monkeypatch.setenv("CANARY_API_KEY", key)
        assert as_reward(reward).score(BATCH).scores == [4.0, 3.0]
        assert service.requests[-1][2]["Authorization"] == f"Bearer {key}"
        assert key not in repr(reward) + repr(vars(reward)) + repr(reward.endpoint)
    caplog.set_level(logging.DEBUG)
    seen: list[Any] = []
    with serving(echo) as service:
        seen.append(asked(service.url, key_env="CANARY_API_KEY"))

    def spiteful(connection: socket.socket) -> None:
        connection.sendall(f"{key}\r\n\r\n".encode())
        connection.shutdown(socket.SHUT_RDWR)

    with speaking(spiteful) as url:
        seen.append(asked(url, key_env="CANARY_API_KEY"))
    assert all(scored.errors[0] is not None for scored in seen)
    assert key not in repr(seen) + caplog.text
    monkeypatch.setenv("CANARY_API_KEY", "sk\r\nX: y")
    with serving(lengths) as service:
        assert "characters that are not valid in an API key" in asked(service.url, key_env="CANARY_API_KEY").errors[0]


def test_a_key_is_not_sent_in_plain_text_over_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_API_KEY", "sk-canary")
    names(monkeypatch, ["10.255.255.1"])
    scored = asked("http://service.test/", key_env="CANARY_API_KEY", timeout=5)
    assert "is not sent over plain http" in scored.errors[0]


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        scored = asked(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert scored.scores == [None, None] and "ConnectionError" in scored.errors[0]


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"most_bytes": 0}, {"retries": -1}, {"rows_per_request": 0}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        RemoteReward("https://host/", **settings)


@contextmanager
def speaking(speak: Any) -> Iterator[str]:
    """A server that reads one request and then says whatever it likes; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection:
                data = b""
                try:
                    while b"\r\n\r\n" not in data:
                        data += connection.recv(1 << 16)
                    length = int(data.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    body = data.partition(b"\r\n\r\n")[2]
                    while len(body) < length:
                        body += connection.recv(1 << 16)
                    json.loads(body)
                    speak(connection)
                except OSError:
                    pass  # the other side has had enough

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        thread.join(timeout=10)
        assert not thread.is_alive()
