"""Serves the report of running runs on this machine: read-only, on loopback, by the standard library alone."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from trl.report.html_page import page
from trl.report.reading import read_run

logger = logging.getLogger(__name__)

_WATCHED = ("metrics.jsonl", "events.log", "findings.jsonl", "summary.json", "config.resolved.yaml")
_COOKIE = "trl_report"
_LEAST_TOKEN = 43  # characters of 256 bits in URL-safe base64
_TIMEOUT = 30.0  # seconds that a connection may stay silent
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest is in the page
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ReportServer(ThreadingHTTPServer):
    """The live page. `serve` returns one that is running; use it as a context manager, or call `close`."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], host: str, port: int, token: str | None) -> None:
        self.runs = runs
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.host, self.port = host, int(self.server_address[1])
        self.secured = token is not None
        self._token = token
        self._session = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._page = ("", b"")
        self._thread = threading.Thread(target=self.serve_forever, name="report server", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address to open, with the token while it has not been used."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.port}/" + (f"?token={self._token}" if self._token else "")

    def close(self) -> None:
        """Stops the server; further calls do nothing."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def wait(self) -> None:
        """Blocks until `close` is called or the process is interrupted."""
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs an error of a request; a browser that closes its connection is none."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            logger.warning("a request to the report's server failed: %s: %s", type(error).__name__, error)

    def version(self) -> str:
        """Changes whenever a run has written something."""
        states = [(folder / name) for folder in self.runs for name in _WATCHED]
        text = "".join(f"{s.st_mtime_ns}.{s.st_size};" for path in states if path.exists() for s in [path.stat()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def current_page(self) -> bytes:
        """The page of the runs as they are now, made once per version."""
        with self._lock:
            version = self.version()
            if self._page[0] != version:
                runs = [read_run(folder, share=len(self.runs)) for folder in self.runs]
                self._page = (version, page(runs, live=True).encode())
            return self._page[1]

    def exchange(self, token: str) -> str | None:
        """The session's cookie value for the token, which is then spent; None for any other."""
        with self._lock:
            if self._token is None or not secrets.compare_digest(token.encode(), self._token.encode()):
                return None
            self._token = None
            return self._session

    def knows(self, session: str) -> bool:
        """Whether a cookie value is the session's."""
        return secrets.compare_digest(session.encode(), self._session.encode())

    def serves_as(self, name: str) -> bool:
        """Whether `name`, from a Host header, is a name of this server; others may be a rebound DNS name."""
        match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]+)(?::(\d+))?", name)
        if match is None or (match[2] or "80") != str(self.port):
            return False
        host = match[1].strip("[]").lower()
        names = {self.host.lower(), "localhost"} if _is_loopback(self.host) else {self.host.lower()}
        if _is_loopback(self.host) and host in ("127.0.0.1", "::1"):
            return True
        if self.host in ("0.0.0.0", "::"):
            return _is_address(host) or host in {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        return host in names


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    server_version, sys_version = "trl", ""
    timeout = _TIMEOUT

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if not self._admitted(url.query):
            return
        if url.path not in ("/", "/version"):
            self._answer(404, "text/plain", b"Not found.\n")
            return
        try:
            body = self.server.current_page() if url.path == "/" else self.server.version().encode()
        except (ValueError, OSError) as error:  # a resumed run removes files while they are read
            logger.warning("the report could not be made: %s", error)
            self._answer(503, "text/plain", b"The runs cannot be read at the moment; try again.\n")
            return
        self._answer(200, "text/html" if url.path == "/" else "text/plain", body)

    do_HEAD = do_GET

    def _refuse_write(self) -> None:
        self.close_connection = True  # the body stays unread
        if not self.server.serves_as(self.headers.get("Host", "")):
            self._answer(400, "text/plain", b"Unknown host.\n")
            return
        origin = self.headers.get("Origin")
        if origin is not None and not (origin.startswith("http://") and self.server.serves_as(origin[7:])):
            self._answer(403, "text/plain", b"Foreign origin.\n")
        else:
            self._answer(405, "text/plain", b"This server only shows.\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_write

    def _admitted(self, query: str) -> bool:
        """Checks host and session, answering the request if it is not admitted."""
        if not self.server.serves_as(self.headers.get("Host", "")):
            self._answer(400, "text/plain", b"Unknown host.\n")
            return False
        if not self.server.secured:
            return True
        admitted = self.server.knows(_session_in(self.headers.get("Cookie", "")))
        token = parse_qs(query).get("token", [""])[0]
        if admitted and not token:
            return True
        session = self.server.exchange(token) if token and not admitted else None
        if admitted or session is not None:
            headers = {"Location": "/"}  # without the token
            if session is not None:
                headers["Set-Cookie"] = f"{_COOKIE}={session}; HttpOnly; SameSite=Strict; Path=/"
            self._answer(303, "text/plain", b"", headers)
        else:
            self._answer(
                403, "text/plain", b"Open the link that was printed. It works once: start again for a new one.\n"
            )
        return False

    def _answer(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing: request lines may hold the token."""


def serve(
    runs: Sequence[str | Path] | str | Path,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    *,
    allow_remote: bool = False,
) -> ReportServer:
    """Starts a server that shows the report of one or several runs and updates it while they go on.

    Anybody on this machine can open the page of a loopback address, unless `token` is given. Other addresses are
    reachable from other machines, without encryption: they need `allow_remote` and always have a token.

    Args:
        runs: run directory, or several to compare.
        host: address to bind.
        port: TCP port; 0 takes a free one.
        token: secret that the first visitor's link exchanges for a cookie, at least 43 characters, such as from
            `secrets.token_urlsafe(32)`. None: none on loopback, a random one elsewhere.
        allow_remote: permit an address that is not of this machine alone.

    Returns:
        The running server; open its `url`, and `close` it.

    Raises:
        ValueError: if a folder is not a run directory, an address needs `allow_remote`, the token is short, or the port
            is out of range.
        OSError: if the address cannot be bound.
    """
    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    if not folders:
        raise ValueError("runs is empty: give at least one run directory")
    if token is not None and len(token) < _LEAST_TOKEN:
        raise ValueError(
            f"token has {len(token)} characters: give at least {_LEAST_TOKEN}, such as secrets.token_urlsafe(32)"
        )
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} must be between 0 and 65535; 0 takes a free one")
    if not _is_loopback(host):
        if not allow_remote:
            raise ValueError(
                f"host={host!r} is reachable from other machines: pass allow_remote=True if they may read these "
                "completions"
            )
        token = token or secrets.token_urlsafe(32)
    paths = [Path(folder).resolve() for folder in folders]
    for folder in paths:
        read_run(folder)  # refuse now what could not be shown later
    return ReportServer(paths, host, port, token)


def _session_in(cookies: str) -> str:
    """The session in a Cookie header. `SimpleCookie` would stop at another program's malformed cookie."""
    pairs = (cookie.strip().partition("=") for cookie in cookies.split(";"))
    return next((value for name, _, value in pairs if name == _COOKIE), "")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
