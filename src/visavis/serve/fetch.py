"""Fetches images from URLs of allowed hosts, and from nothing else.

The address that a host name resolves to is checked and then connected to, so that a second answer
of the name server changes nothing (DNS rebinding). Private, loopback, link-local and other
addresses that are not of the public internet are refused, in every spelling, because addresses are
compared and not their texts. Each redirect is checked like the first URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from urllib.parse import SplitResult, urljoin, urlsplit

from visavis.errors import InputError

MAX_REDIRECTS = 3
MAX_SECONDS = 15.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None:
            return False
        if inner is not None:
            return is_public(inner)
        if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return address.is_global and not address.is_multicast and not address.is_reserved


class Fetcher:
    """Fetches what URLs of some hosts hold.

    Args:
        hosts: names of the hosts, without ports.
        max_bytes: of one response.
        permitted: whether an address may be connected to.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        max_bytes: int,
        permitted: Callable[[Address], bool] = is_public,
    ) -> None:
        self.hosts = {host.lower() for host in hosts}
        self.max_bytes, self.permitted = max_bytes, permitted

    def fetch(self, url: str) -> bytes:
        """Return the body of a URL; blocks, at most MAX_SECONDS.

        Raises:
            InputError: the host is not allowed, its address is not public, or the response is an
                error, too large or too slow.
        """
        deadline = time.monotonic() + MAX_SECONDS
        for _ in range(MAX_REDIRECTS + 1):
            parts = self._checked(url)
            try:
                found = self._get(parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                name = type(error).__name__
                raise InputError(f"{parts.hostname} could not be fetched from ({name})") from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise InputError(f"more than {MAX_REDIRECTS} redirects, starting at {parts.hostname}")

    def _checked(self, url: str) -> SplitResult:
        if not self.hosts:
            raise InputError(
                "this server fetches no URLs; send the image as a data URI "
                "(data:image/png;base64,…), or start the server with --allow-url HOST"
            )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InputError("the URL of an image is malformed") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the URL of an image has the scheme {parts.scheme[:20]!r}, not http")
        if parts.username is not None or parts.password is not None:
            raise InputError("the URL of an image holds a user name or password")
        if parts.hostname.lower() not in self.hosts:
            raise InputError(
                f"images may not be fetched from {parts.hostname[:100]}; allowed are "
                f"{', '.join(sorted(self.hosts))}"
            )
        if not (url.isascii() and url.isprintable()) or " " in url or port == 0:
            raise InputError("the URL of an image is malformed")
        return parts

    def _get(self, parts: SplitResult, deadline: float) -> bytes | str:
        """Return a response's body, or where it redirects to."""
        host, secure = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        left = _left(deadline)
        connection = http.client.HTTPConnection(host, port, timeout=left)
        # The checked address is connected to; HTTPConnection would resolve the name again.
        sock = self._connect(host, port, left)
        try:
            if secure:
                sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host)
            connection.sock = sock
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            headers = {"accept": "image/*, video/*, application/pdf", "user-agent": "visavis"}
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return response.headers.get("location", "")
            if response.status != 200:
                raise InputError(f"{host} answered with status {response.status}")
            return self._read(response, sock, host, deadline)
        finally:
            connection.close()
            sock.close()

    def _connect(self, host: str, port: int, timeout: float) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            if not self.permitted(ipaddress.ip_address(str(address[0]).partition("%")[0])):
                continue
            opened = socket.socket(family, kind, protocol)
            opened.settimeout(timeout)
            try:
                opened.connect(address)
                return opened
            except OSError:
                opened.close()
        raise InputError(f"{host} has no public address that can be reached")

    def _read(
        self, response: http.client.HTTPResponse, sock: socket.socket, host: str, deadline: float
    ) -> bytes:
        body = bytearray()
        while True:
            sock.settimeout(_left(deadline))
            chunk = response.read1(65536)
            if not chunk:
                return bytes(body)
            body += chunk
            if len(body) > self.max_bytes:
                raise InputError(f"{host} sent more than {self.max_bytes // 2**20} MiB")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise InputError(f"fetching took more than {MAX_SECONDS:.0f} s")
    return left
