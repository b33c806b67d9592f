"""Fetches http and https addresses of allowed hosts, within limits.

The name is resolved once, all its addresses are checked, and the connection goes to one of them. So
a name cannot change its address in between (DNS rebinding). Proxies of the
environment are not used. A redirect is followed only to the same host.
"""

import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Collection

from internvl3_jax.io.safe_files import reason
from internvl3_jax.io.terminal import short_name
from internvl3_jax.serve.errors import ApiError

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16
_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Fetches images of allowed hosts.

    Attributes:
      hosts: names, "HOST" for its usual ports or "HOST:PORT"; none: nothing is fetched.
      max_bytes: of an image.
      seconds: for one image, all redirects included.
      private: also addresses of this machine and of private networks.
    """

    hosts: Collection[str] = ()
    max_bytes: int = 32 << 20
    seconds: float = 20.0
    private: bool = False

    def fetch(self, url: str) -> bytes:
        """Returns the body that an address answers with.

        Raises:
          ApiError: the address is not allowed, or cannot be fetched within the limits.
        """
        deadline = time.monotonic() + self.seconds
        first_host = None
        for _ in range(MAX_REDIRECTS + 1):
            parts, host = self._check(url)
            if first_host not in (None, host):
                raise _refused(f"{short_name(url)}: is a redirect to another host")
            first_host = host
            try:
                body, target = self._get(url, parts, deadline)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ApiError(
                    f"{short_name(url)}: cannot be fetched ({reason(error)}); check the address, "
                    "or send the image as a data: URL",
                    code="fetch_failed",
                ) from error
            if target is None:
                return body
            url = urllib.parse.urljoin(url, target)
        raise ApiError(
            f"{short_name(url)}: more than {MAX_REDIRECTS} redirects; give the last address",
            code="fetch_failed",
        )

    def _check(self, url: str) -> tuple[urllib.parse.SplitResult, str]:
        """Returns the parts of an address and its host, if it may be fetched."""
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ApiError(f"{short_name(url)}: is not an address ({error})") from error
        if not self.hosts:
            raise _refused(
                f"{short_name(url)}: this server fetches no addresses; send a data: URL, or start "
                "it with --allow_hosts HOST"
            )
        name = (parts.hostname or "").rstrip(".").lower()
        usual = port in (None, _PORTS.get(parts.scheme))
        host = name if usual else f"{name}:{port}"
        if parts.username or parts.password:
            raise _refused("an address with a user name or password is not fetched")
        if parts.scheme not in _PORTS or not name or host not in self.hosts:
            raise _refused(
                f"{short_name(url)}: {host or 'no host'} is not on --allow_hosts; send a data: URL"
            )
        if not url.isascii() or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
            raise ApiError(f"{short_name(url)}: has spaces or other letters; percent-encode them")
        return parts, host

    def _get(self, url: str, parts, deadline: float) -> tuple[bytes, str | None]:
        """Returns (body, None), or (b"", target of a redirect)."""
        with contextlib.ExitStack() as stack:
            connection = self._connect(parts, deadline)
            stack.callback(connection.close)
            # Timeouts of a socket are of one read; this one is of all.
            timer = threading.Timer(_remaining(deadline), _cut, [connection.sock])
            stack.callback(timer.cancel)
            timer.start()
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", path, headers={"User-Agent": "internvl3_jax"})
            response = connection.getresponse()
            if response.status in _REDIRECTS and response.getheader("Location"):
                return b"", response.getheader("Location")
            if response.status != 200:
                raise ApiError(
                    f"{short_name(url)}: answered with status {response.status}; check the address",
                    code="fetch_failed",
                )
            body = bytearray()
            while piece := response.read1(_PIECE):
                body += piece
                if len(body) > self.max_bytes:
                    raise ApiError(
                        f"{short_name(url)}: has more than {self.max_bytes:,} bytes; send a smaller "
                        "image",
                        413,
                        code="file_too_large",
                    )
            _remaining(deadline)
            if response.length:
                raise OSError(f"{response.length:,} bytes are missing")
            return bytes(body), None

    def _connect(self, parts, deadline: float) -> http.client.HTTPConnection:
        port = parts.port or _PORTS[parts.scheme]
        addresses = self._addresses(parts.hostname, port)
        connection = http.client.HTTPConnection(parts.hostname, port)
        seconds = _remaining(deadline)
        connection.sock = socket.create_connection((addresses[0], port), timeout=seconds)
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                connection.sock = context.wrap_socket(
                    connection.sock, server_hostname=parts.hostname
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _addresses(self, host: str, port: int) -> list[str]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [entry[4][0] for entry in found]
        if not self.private:
            for address in addresses:
                if not _is_public(address):
                    raise _refused(
                        f"{host} has the address {address}, which is private; it is fetched only "
                        "with --allow_private_hosts"
                    )
        return addresses


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    return parsed.is_global and not parsed.is_multicast and (inner is None or inner.is_global)


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it takes too long")
    return seconds


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _refused(message: str) -> ApiError:
    return ApiError(message, 403, code="address_not_allowed")
