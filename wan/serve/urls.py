"""Files of URLs that strangers name, never of addresses that only this machine or its network can reach.

The address is looked up once, checked, and the one that was checked is connected to: a name that is looked up anew can
have another address (DNS rebinding). Redirects are followed by the same rules. No proxy of the environment is used.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit

from wan.serve.refused import Refused, bad

MOST_REDIRECTS = 4
CONNECT_S, ALL_S = 10.0, 120.0
_BLOCK_BYTES = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)
# Addresses that stand for those of IPv4 in them: NAT64 (RFC 6052, 8215), 6to4 (RFC 3056).
_NAT64 = [ipaddress.ip_network(one) for one in ("64:ff9b::/96", "64:ff9b:1::/48")]
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


def fetch(url: str, path: Path, most_bytes: int) -> None:
    """Write what a URL holds to a file. Raises Refused."""
    deadline = time.monotonic() + ALL_S
    for _ in range(MOST_REDIRECTS + 1):
        parts = _checked(url)
        connection = _connection(parts)
        end = threading.Timer(max(0.0, deadline - time.monotonic()), connection.shut)
        end.start()  # for one that sends a byte at times
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"User-Agent": "swan-video", "Accept": "*/*"})
            answer = connection.getresponse()
            where = answer.getheader("Location")
            if answer.status in _REDIRECTS and where:
                url = urljoin(url, where)
                continue
            if answer.status != 200:
                raise bad(None, f"the URL's server answers with status {answer.status}", "url_failed")
            _write(answer, path, most_bytes)
            return
        except (OSError, http.client.HTTPException, ValueError, UnicodeError) as error:
            raise bad(None, f"the URL cannot be fetched: {type(error).__name__}", "url_failed") from error
        finally:
            end.cancel()
            connection.close()
    raise bad(None, f"the URL redirects more than {MOST_REDIRECTS} times", "url_failed")


def _write(answer: http.client.HTTPResponse, path: Path, most_bytes: int) -> None:
    left = most_bytes
    with open(path, "wb") as file:
        while block := answer.read1(_BLOCK_BYTES):
            left -= len(block)
            if left < 0:
                raise Refused(413, f"what the URL holds is larger than {most_bytes:,} bytes", "too_large")
            file.write(block)
    if answer.length:  # of what was announced
        raise bad(None, f"the URL ends too early, or takes longer than {ALL_S:g} s", "url_failed")


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_right = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        is_right = False
    if not is_right or parts.username or any(not 32 < ord(letter) < 127 for letter in url):
        raise bad(None, "a URL must be http:// or https://, a host and a path, in ASCII letters, without a password")
    return parts


def _connection(parts: SplitResult) -> _Plain:
    """To a host of the public internet, not connected yet."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise bad(None, "the URL's host is not known", "url_failed") from error
    addresses = [one[4][0] for one in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(400, "the URL's host is not one of the public internet", "url_refused")
    kind = _Secure if parts.scheme == "https" else _Plain
    connection = kind(parts.hostname, port, timeout=CONNECT_S)
    connection.address = addresses[0]
    return connection


def is_public(address: str) -> bool:
    """Whether it is an address that anybody can reach, and not this machine, its network, or a cloud's own."""
    one = ipaddress.ip_address(address.partition("%")[0])
    if one.version == 6:
        if one.ipv4_mapped is not None:
            one = one.ipv4_mapped
        elif any(one in network for network in _NAT64):
            one = ipaddress.ip_address(int(one) & 0xFFFFFFFF)
        elif one in _SIX_TO_FOUR:
            one = ipaddress.ip_address((int(one) >> 80) & 0xFFFFFFFF)
    return one.is_global and not one.is_multicast and not one.is_reserved


class _Plain(http.client.HTTPConnection):
    """Connects to `address`, whatever its host's name stands for by now."""

    address = ""

    def connect(self) -> None:
        self.sock = socket.create_connection((self.address, self.port), self.timeout)

    def shut(self) -> None:
        """From another thread, which ends what waits for it."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


class _Secure(_Plain):
    default_port = 443

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
