"""The live server: whom it answers (promises S5 and S6), and that it shows what has been written since."""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.runs import make_run, row
from trl.report import serve
from trl.report.live import ReportServer
from trl.trackers import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", summary={})


@pytest.fixture
def server(run: Path) -> Iterator[ReportServer]:
    with serve(run) as server:
        yield server


def ask(
    server: ReportServer, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    headers = {"Host": f"127.0.0.1:{server.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def test_loopback_alone_and_without_a_token(server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1" and server.url == f"http://127.0.0.1:{server.port}/"
    status, headers, body = ask(server)
    assert status == 200 and b"Stopped without saying why at step 20" in body
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY" and "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control")]
    assert b"connect-src &#39;self&#39;" in body and headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "host",
    [
        "evil.test",
        "evil.test:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1.evil.test:{port}",
        "",
        "[::1",
        "localhost:{port}@evil.test",
    ],
)
def test_a_wrong_host_is_refused(server: ReportServer, host: str) -> None:
    for method in ("GET", "POST"):
        assert ask(server, method=method, Host=host.format(port=server.port))[0] == 400


@pytest.mark.parametrize("host", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST:{port}"])
def test_names_of_this_machine_are_right(server: ReportServer, host: str) -> None:
    assert ask(server, Host=host.format(port=server.port))[0] == 200


def test_writes_are_refused(server: ReportServer) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        assert ask(server, method=method)[0] == 405
        assert ask(server, method=method, Origin=f"http://127.0.0.1:{server.port}")[0] == 405
        for origin in ("null", "https://evil.test", f"https://127.0.0.1:{server.port}", "http://127.0.0.1:1"):
            assert ask(server, method=method, Origin=origin)[0] == 403, (method, origin)


def test_other_paths_are_not_there(server: ReportServer) -> None:
    for path in ("/metrics.jsonl", "/../../etc/passwd", "/%2e%2e/x", "/completions/", "//evil.test"):
        assert ask(server, path)[0] == 404


def test_a_token_is_exchanged_once_for_a_cookie(run: Path) -> None:
    token = secrets.token_urlsafe(32)
    with serve(run, token=token) as server:
        assert server.url.endswith(f"/?token={token}")
        assert ask(server)[0] == ask(server, "/version")[0] == 403
        assert ask(server, "/?token=" + secrets.token_urlsafe(32))[0] == 403
        assert ask(server, "/?token=%C3%A4")[0] == 403
        status, headers, body = ask(server, f"/?token={token}")
        assert (status, headers["location"], body) == (303, "/", b"")
        cookie = headers["set-cookie"]
        assert "; HttpOnly" in cookie and "; SameSite=Strict" in cookie and token not in cookie
        assert token not in server.url  # it is spent
        assert ask(server, f"/?token={token}")[0] == 403
        session = cookie.split(";")[0]
        assert ask(server, Cookie=session)[0] == ask(server, "/version", Cookie=session)[0] == 200
        assert ask(server, f"/?token={token}", Cookie=session)[1]["location"] == "/"  # a reloaded link
        assert ask(server, Cookie=session + "x")[0] == 403


def test_cookies_of_other_programs_are_in_no_way(run: Path) -> None:
    """Cookies of localhost belong to every port: a name or value that SimpleCookie refuses must not hide ours."""
    with serve(run, token=secrets.token_urlsafe(32)) as server:
        _, headers, _ = ask(server, server.url.removeprefix(f"http://127.0.0.1:{server.port}"))
        session = headers["set-cookie"].partition(";")[0]
        for other in ('seen={"a": 1}', "a:b=1", "path=/x", "nothing"):
            assert ask(server, Cookie=f"{other}; {session}")[0] == 200
        assert ask(server, Cookie="a:b=1")[0] == 403


def test_port_80_is_not_named(server: ReportServer) -> None:
    server.port = 80
    assert all(map(server.serves_as, ("localhost", "127.0.0.1", "[::1]", "127.0.0.1:80")))
    assert not any(map(server.serves_as, ("", ":80", "evil.test", "127.0.0.1:8", "127.0.0.1:", "::1")))


def test_a_browser_that_goes_away_is_no_error(server: ReportServer, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
    assert ask(server)[0] == 200
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_the_token_is_in_no_log(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(run, token="t" * 43) as server:
        ask(server, "/?token=" + "t" * 43)
    captured = capfd.readouterr()
    assert "t" * 43 not in captured.out + captured.err


def test_other_addresses_need_a_flag_and_have_a_token(run: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.test"):
        with pytest.raises(ValueError, match="reachable from other machines: pass allow_remote=True"):
            serve(run, host=host)
    with pytest.raises(ValueError, match="token has 5 characters: give at least 43"):
        serve(run, token="short")
    with serve(run, host="0.0.0.0", allow_remote=True) as server:
        assert len(server.url.partition("token=")[2]) >= 43
        assert ask(server)[0] == 403 and ask(server, Host=f"evil.test:{server.port}")[0] == 400


def test_the_page_follows_the_run(run: Path, server: ReportServer) -> None:
    before, page = ask(server, "/version")[2], ask(server)[2]
    assert ask(server, "/version")[2] == before
    with RunDirectory.open(run) as writer:
        writer.log(row(21), 21)
    assert ask(server, "/version")[2] != before
    changed = ask(server)[2]
    assert changed != page
    data = changed.split(b'id="report-data">')[1].split(b"</script>")[0]
    assert json.loads(data)["runs"][0]["steps"][-1] == 21 and json.loads(data)["live"] is True


def test_a_run_that_cannot_be_read_is_asked_for_again_later(run: Path, server: ReportServer) -> None:
    (run / "config.resolved.yaml").write_text("a: [")
    assert ask(server)[0] == 503
    (run / "config.resolved.yaml").write_text("{}")
    assert ask(server)[0] == 200


def test_it_stops_cleanly(run: Path) -> None:
    server = serve(run)
    ask(server)
    server.close()
    server.wait()
    started = time.monotonic()
    with pytest.raises(OSError):
        ask(server)
    assert time.monotonic() - started < 20


def test_what_cannot_be_shown_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        serve(tmp_path)
    with pytest.raises(ValueError, match="runs is empty"):
        serve([])
