"""JSON over HTTP to an address that the operator chose, with nothing left to the other side. Standard library only."""

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

# Where clouds keep the credentials of a machine, beside the link-local addresses that most of them use.
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_BUSY = (429, 502, 503, 504)  # worth another attempt


class Refused(ValueError):
    """An address, or an answer, that is not accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where JSON is sent, and the limits of it.

    Raises:
        ValueError: if the URL is not of an allowed scheme, has user information or a fragment, or lacks a host; or a
            limit is out of range.
    """

    url: str
    """Of the service."""
    key_env: str | None = None
    """The environment variable that holds the key, sent as a bearer token; read at each request, kept nowhere."""
    timeout: float = 30.0
    """Seconds for one attempt, from the look-up of the name to the last byte."""
    most_bytes: int = 1 << 20
    """Of an answer."""
    retries: int = 0
    """Further attempts after a failed connection or an answer 429, 502, 503 or 504, 0.5, 1, 2 ... seconds apart."""
    schemes: Sequence[str] = ("https", "http")
    """Those allowed."""
    allow_link_local: bool = False
    """Whether link-local addresses (169.254.0.0/16, fe80::/10) and those where clouds keep credentials are allowed."""

    def __post_init__(self) -> None:
        shown = _shown(self.url)
        if any(ord(c) <= 32 or ord(c) >= 127 for c in self.url):
            raise ValueError(f"url={shown!r} has white space or characters that need escaping")
        parts = urlsplit(self.url)
        if parts.scheme not in self.schemes or parts.scheme not in ("https", "http"):
            raise ValueError(f"url={shown!r} has the scheme {parts.scheme!r}; allowed are {', '.join(self.schemes)}")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"url={shown!r} has user information; name an environment variable in key_env instead")
        if not parts.hostname or parts.fragment:
            raise ValueError(f"url={shown!r} must have a host and no fragment")
        _ = parts.port  # raises ValueError if it is no port
        if not 0 < self.timeout < math.inf or self.most_bytes < 1 or self.retries < 0:
            raise ValueError(
                f"timeout={self.timeout}, most_bytes={self.most_bytes} and retries={self.retries} must be positive "
                "(retries may be 0)"
            )


def post_json(endpoint: Endpoint, message: Any) -> Any:
    """Posts JSON and returns the JSON that is answered.

    Raises:
        Refused: if the address, the status or the answer is not acceptable.
        OSError: if there is no connection, or no answer in time.
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
    """Refuses addresses that no service has: link-local and metadata addresses unless allowed, multicast, unspecified.

    Raises:
        Refused: naming the address.
    """
    for inner in _embedded(address):
        if (
            inner.is_multicast
            or inner.is_unspecified
            or (inner.is_reserved and not inner.is_loopback and inner not in _NAT64)
        ):
            raise Refused(f"the address {address} is of no single machine")
        if not allow_link_local and (inner.is_link_local or inner in _METADATA):
            raise Refused(f"the address {address} is link-local or of a cloud's metadata; allow_link_local is off")


def _embedded(address: Address) -> list[Address]:
    """The address, and the IPv4 address that it stands for, if any."""
    found: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        found += [each for each in inner if each is not None]
        if address.ipv4_mapped is not None:
            found.remove(address)  # ::ffff:0:0/96 as a whole counts as reserved
    return found


def _attempt(endpoint: Endpoint, body: bytes) -> Any:
    deadline = time.monotonic() + endpoint.timeout
    parts = urlsplit(endpoint.url)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    # The look-up has no timeout of its own.
    found = call_within(endpoint.timeout, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        check_address(ipaddress.ip_address(address.partition("%")[0]), endpoint.allow_link_local)
    # To an address that was checked: a second look-up could say something else.
    connection = _Connection(host, port, addresses, tls=parts.scheme == "https", timeout=endpoint.timeout)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = {"Content-Type": "application/json", "Accept": "application/json"} | _authorization(endpoint, addresses)
    try:
        left = max(deadline - time.monotonic(), 0.001)
        return call_within(left, lambda: _exchange(connection, target, body, headers, endpoint))
    finally:
        connection.abort()  # an exchange that was given up ends with its socket


def _exchange(connection: _Connection, target: str, body: bytes, headers: dict[str, str], endpoint: Endpoint) -> Any:
    connection.request("POST", target, body=body, headers=headers)
    with connection.getresponse() as response:
        status = f"{response.status} {http.client.responses.get(response.status, '')}".strip()
        if response.status in _BUSY:
            raise ConnectionError(f"the service answered {status}")
        if 300 <= response.status < 400:
            raise Refused(f"the service answered {status}: redirects are not followed")
        if response.status != 200:
            raise Refused(f"the service answered {status}; expected 200")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise Refused("the answer is compressed, which was not asked for")
        answer = response.read(endpoint.most_bytes + 1)
        if len(answer) > endpoint.most_bytes:
            raise Refused(f"the answer is longer than most_bytes={endpoint.most_bytes}")
        if response.length:
            raise ConnectionError("the answer ended early")
    key = _key(endpoint)
    if key is not None and key.encode() in answer:
        raise Refused("the answer repeats the key, which would spread it")
    return read_json(answer)


def read_json(text: bytes | str) -> Any:
    """JSON as it is defined: without NaN and Infinity.

    Raises:
        Refused: if it is not.
    """
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the answer is not JSON: {one_line(str(error))}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


class _Connection(http.client.HTTPConnection):
    """A connection to the first of some addresses that accepts one, in the name of a host."""

    def __init__(self, host: str, port: int, addresses: Sequence[str], *, tls: bool, timeout: float) -> None:
        if tls:
            self.default_port = 443  # which the Host header leaves out
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
        """Ends whatever another thread waits for on this connection."""
        if self.sock is not None:
            with contextlib.suppress(OSError):  # closed already, or never open
                self.sock.shutdown(socket.SHUT_RDWR)
        self.close()


def _authorization(endpoint: Endpoint, addresses: Sequence[str]) -> dict[str, str]:
    key = _key(endpoint)
    if key is None:
        return {}
    here = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    if urlsplit(endpoint.url).scheme == "http" and not here:
        raise Refused(f"the key in {endpoint.key_env} is not sent over plain http to another machine")
    return {"Authorization": f"Bearer {key}"}


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.key_env is None:
        return None
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key:
        raise Refused(f"the environment variable {endpoint.key_env} holds no key")
    if not key.isascii() or not key.isprintable():
        raise Refused(f"the environment variable {endpoint.key_env} holds characters that no key has")
    return key


def _without_key(error: Exception, endpoint: Endpoint) -> Exception:
    """An error of the same kind in one line, without the key, should the other side have sent it back."""
    text = one_line(str(error))
    key = os.environ.get(endpoint.key_env, "").strip() if endpoint.key_env else ""
    if key:
        text = text.replace(key, "***")
    kind = TimeoutError if isinstance(error, TimeoutError) else ConnectionError
    return kind(text or type(error).__name__)


def _shown(url: str) -> str:
    """A URL for messages: without what stands before an @, and without its query, where secrets are found."""
    scheme, separator, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path.partition('?')[0]}"[:200]
