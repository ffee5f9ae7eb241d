"""Hardened JSON-over-HTTP client: no redirects, checked addresses, bounded time and size. Standard library only."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import math
import os
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from trl.rewards.failures import one_line
from trl.rewards.isolation import call_within

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Cloud metadata services, which hand out credentials, outside the link-local range that most clouds use.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_RETRIED_STATUSES = (429, 502, 503, 504)  # HTTP statuses worth a retry


class Refused(ValueError):
    """Raised for an unacceptable address, status or answer; never retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A URL to post JSON to, with its limits.

    Raises:
        ValueError: if the URL has a scheme that is not allowed, user information or a fragment, or no host; or if a
            limit is out of range.
    """

    url: str
    """URL of the service."""
    key_env: str | None = None
    """Environment variable holding the API key, sent as a bearer token; read at each request and never stored."""
    timeout: float = 30.0
    """Seconds per attempt, from the DNS lookup to the last byte."""
    most_bytes: int = 1 << 20
    """Maximum size of an answer in bytes."""
    retries: int = 0
    """Retries after a connection error or a status of 429, 502, 503 or 504, after 0.5, 1, 2 ... up to 30 seconds."""
    schemes: Sequence[str] = ("https", "http")
    """Allowed URL schemes."""
    allow_link_local: bool = False
    """Whether to allow link-local addresses (169.254.0.0/16, fe80::/10) and cloud metadata services."""

    def __post_init__(self) -> None:
        printable_url = _without_secrets(self.url)
        if any(ord(c) <= 32 or ord(c) >= 127 for c in self.url):
            raise ValueError(f"url={printable_url!r} contains whitespace or characters that must be percent-encoded")
        parts = urlsplit(self.url)
        if parts.scheme not in self.schemes or parts.scheme not in ("https", "http"):
            raise ValueError(
                f"url={printable_url!r} has the scheme {parts.scheme!r}; allowed are {', '.join(self.schemes)}"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"url={printable_url!r} contains user information; name an environment variable in key_env instead"
            )
        if not parts.hostname or parts.fragment:
            raise ValueError(f"url={printable_url!r} must have a host and no fragment")
        _ = parts.port  # raises ValueError for an invalid port
        if not 0 < self.timeout < math.inf or self.most_bytes < 1 or self.retries < 0:
            raise ValueError(
                f"timeout={self.timeout}, most_bytes={self.most_bytes} and retries={self.retries} must be positive "
                "(retries may be 0)"
            )


def post_json(endpoint: Endpoint, message: Any) -> Any:
    """Posts JSON and returns the parsed JSON answer.

    Raises:
        Refused: if the address, the status or the answer is not acceptable.
        OSError: if the connection fails or times out, after all retries.
    """
    body = json.dumps(message, allow_nan=False).encode("ascii")
    for attempt in range(endpoint.retries + 1):
        try:
            return _attempt(endpoint, body)
        except (OSError, http.client.HTTPException) as error:
            if attempt == endpoint.retries:
                raise _without_key(error, endpoint) from None
            time.sleep(min(0.5 * 2**attempt, 30.0))
    raise AssertionError("the last attempt returns or raises")


def check_address(address: Address, allow_link_local: bool = False) -> None:
    """Rejects multicast, unspecified and reserved addresses, and link-local and metadata ones unless allowed.

    Raises:
        Refused: if the address is rejected.
    """
    for inner in _embedded(address):
        if (
            inner.is_multicast
            or inner.is_unspecified
            or (inner.is_reserved and not inner.is_loopback and inner not in _NAT64)
        ):
            raise Refused(f"the address {address} is multicast, unspecified or reserved")
        if not allow_link_local and (inner.is_link_local or inner in _METADATA):
            raise Refused(
                f"the address {address} is link-local or a cloud metadata service; allow_link_local=True allows it"
            )


def _embedded(address: Address) -> list[Address]:
    """Returns the address and any IPv4 addresses embedded in it; only the IPv4 address if it is IPv4-mapped."""
    addresses: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        addresses += [embedded for embedded in inner if embedded is not None]
        if address.ipv4_mapped is not None:
            addresses.remove(address)  # all of ::ffff:0:0/96 is marked reserved
    return addresses


def _attempt(endpoint: Endpoint, body: bytes) -> Any:
    deadline = time.monotonic() + endpoint.timeout
    parts = urlsplit(endpoint.url)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    # getaddrinfo has no timeout.
    resolved = call_within(endpoint.timeout, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    addresses = [str(entry[4][0]) for entry in resolved]
    for address in addresses:
        check_address(ipaddress.ip_address(address.partition("%")[0]), endpoint.allow_link_local)
    # Connect to a checked address: a second lookup could return a different one (DNS rebinding).
    connection = _Connection(host, port, addresses, tls=parts.scheme == "https", timeout=endpoint.timeout)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": "application/json", "Accept": "application/json"} | _authorization(endpoint, addresses)
    try:
        remaining = max(deadline - time.monotonic(), 0.001)
        return call_within(remaining, lambda: _exchange(connection, target, body, headers, endpoint))
    finally:
        connection.abort()  # closing the socket ends an abandoned exchange


def _exchange(connection: _Connection, target: str, body: bytes, headers: dict[str, str], endpoint: Endpoint) -> Any:
    connection.request("POST", target, body=body, headers=headers)
    with connection.getresponse() as response:
        status = f"{response.status} {http.client.responses.get(response.status, '')}".strip()
        if response.status in _RETRIED_STATUSES:
            raise ConnectionError(f"the service answered {status}")
        if 300 <= response.status < 400:
            raise Refused(f"the service answered {status}: redirects are not followed")
        if response.status != 200:
            raise Refused(f"the service answered {status}; expected 200")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise Refused("the answer is compressed; expected an uncompressed one")
        answer = response.read(endpoint.most_bytes + 1)
        if len(answer) > endpoint.most_bytes:
            raise Refused(f"the answer is longer than most_bytes={endpoint.most_bytes}")
        if response.length:
            raise ConnectionError("the answer ended early")
    key = _key(endpoint)
    if key is not None and key.encode() in answer:
        raise Refused(f"the answer contains the API key in {endpoint.key_env}, which must not reach logs or files")
    return read_json(answer)


def read_json(text: bytes | str) -> Any:
    """Parses strict JSON, without NaN and Infinity.

    Raises:
        Refused: if `text` is not strict JSON.
    """
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the answer is not JSON: {one_line(str(error))}") from None


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class _Connection(http.client.HTTPConnection):
    """An HTTP(S) connection to the first reachable one of several addresses of a host."""

    def __init__(self, host: str, port: int, addresses: Sequence[str], *, tls: bool, timeout: float) -> None:
        if tls:
            self.default_port = 443  # so that the Host header omits it
        super().__init__(host, port, timeout=timeout)
        self.addresses = addresses
        self.context = ssl.create_default_context() if tls else None

    def connect(self) -> None:
        for address in self.addresses:
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
            except OSError:
                if address == self.addresses[-1]:
                    raise
            else:
                break
        if self.context is not None:
            self.sock = self.context.wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """Closes the connection, which unblocks any thread waiting on it."""
        if self.sock is not None:
            with contextlib.suppress(OSError):  # already closed, or never connected
                self.sock.shutdown(socket.SHUT_RDWR)
        self.close()


def _authorization(endpoint: Endpoint, addresses: Sequence[str]) -> dict[str, str]:
    key = _key(endpoint)
    if key is None:
        return {}
    all_loopback = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    if urlsplit(endpoint.url).scheme == "http" and not all_loopback:
        raise Refused(f"the API key in {endpoint.key_env} is not sent over plain http to another machine; use https")
    return {"Authorization": f"Bearer {key}"}


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise Refused(f"the environment variable {endpoint.key_env} is unset or empty; expected an API key")
    if not key.isascii() or not key.isprintable():
        raise Refused(
            f"the environment variable {endpoint.key_env} contains characters that are not valid in an API key"
        )
    return key


def _without_key(error: Exception, endpoint: Endpoint) -> Exception:
    """Returns a TimeoutError or ConnectionError with a one-line message and any echoed key redacted."""
    text = one_line(str(error))
    key = os.environ.get(endpoint.key_env, "").strip() if endpoint.key_env else ""
    if key:
        text = text.replace(key, "***")
    kind = TimeoutError if isinstance(error, TimeoutError) else ConnectionError
    return kind(text or type(error).__name__)


def _without_secrets(url: str) -> str:
    """Formats a URL for messages, without user information and query, which may hold secrets."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path.partition('?')[0]}"[:200]
