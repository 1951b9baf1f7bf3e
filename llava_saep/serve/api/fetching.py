"""Images at https addresses of hosts that the server's owner named; by default there are none.

A request that makes a server fetch an address can reach what only the server reaches. So the name must be on the list,
every address that it resolves to must be public, the connection goes to the address that was checked (a second look-up
could answer otherwise), and each redirect goes through the same checks.
"""

import ipaddress
import socket
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network

import httpx

from llava_saep.errors import UserError

FETCH_SECONDS = 20.0
"""For all images of one request together."""

_STEP_SECONDS = 5.0
_MAX_REDIRECTS = 3
_TRANSLATED_NETWORK = IPv6Network("64:ff9b::/96")
"""NAT64: these IPv6 addresses lead to the IPv4 address in their last four bytes, private ones too."""
_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""Of IPv6, all that was ever given to anyone; Python takes deprecated kinds for global too, such as fec0::1."""


def resolve(host: str) -> list[str]:
    """Return all addresses of a host name.

    Raises:
        OSError: there is none.
    """
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(address[0]).partition("%")[0] for *_, address in found]


class ImageFetcher:
    """Fetches images from a list of hosts.

    Args:
        allowed_hosts: exact names in lower case, without port; a name does not stand for its subdomains.
        max_bytes: of an image.
        resolve: from a host name to its addresses.
        transport: for tests; None: the network.
    """

    def __init__(
        self,
        allowed_hosts: frozenset[str],
        *,
        max_bytes: int,
        resolve: Callable[[str], list[str]] = resolve,
        transport: httpx.BaseTransport | None = None,
    ):
        self.allowed_hosts = allowed_hosts
        self.max_bytes = max_bytes
        self._resolve = resolve
        self._transport = transport

    def deadline(self) -> float:
        """The time on `time.monotonic` when a request that begins now has waited long enough for its images."""
        return time.monotonic() + FETCH_SECONDS

    def fetch(self, address: str, deadline: float) -> bytes:
        """Return what is at an address.

        Raises:
            UserError: the address is not allowed, or nothing of the size came from it in time.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            content, redirect = self._fetch_once(self._checked_url(address), deadline)
            if redirect is None:
                return content
            address = redirect
        raise UserError(f"the image's address redirects more than {_MAX_REDIRECTS} times")

    def _checked_url(self, address: str) -> httpx.URL:
        if not self.allowed_hosts:
            raise UserError(
                "images are not fetched from addresses here; send them as data:image/...;base64,... in image_url.url"
            )
        try:
            url = httpx.URL(address.strip())
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise UserError("image_url.url is no address") from error
        if url.scheme != "https" or url.port not in (None, 443) or url.userinfo:
            raise UserError("images are fetched from https:// addresses alone, without another port or a password")
        if url.host.lower().rstrip(".") not in self.allowed_hosts:
            raise UserError(f"images are not fetched from {url.host[:100]!r}; send them as data:image/...;base64,...")
        return url

    def _fetch_once(self, url: httpx.URL, deadline: float) -> tuple[bytes, str | None]:
        """Return the content, or where else it is."""
        address = self._public_address(url.host)
        # The name stays in the Host header and in the TLS handshake, whose certificate is checked against it.
        request = httpx.Request(
            "GET",
            url.copy_with(host=address, fragment=None),
            headers={"Host": url.netloc.decode("ascii"), "User-Agent": "llava-saep", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        timeout = max(0.1, min(_STEP_SECONDS, deadline - time.monotonic()))
        # Settings of the environment could name a proxy, which would look the name up again.
        with httpx.Client(transport=self._transport, timeout=timeout, trust_env=False) as client:
            request.extensions["timeout"] = httpx.Timeout(timeout).as_dict()
            try:
                response = client.send(request, stream=True)
                if response.is_redirect:
                    return b"", str(url.join(response.headers["location"]))
                if response.status_code != 200:
                    raise UserError(f"the image's host answered with status {response.status_code}")
                return self._read(response, deadline), None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise UserError("the image cannot be fetched from its address") from error

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        content = bytearray()
        # Raw: a compressed answer, which was not asked for, must not be able to grow here.
        for chunk in response.iter_raw():  # with a chunk size it would wait for so many bytes, at any pace
            content += chunk
            if len(content) > self.max_bytes:
                raise UserError(f"the image at the address has more than {self.max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise UserError(f"the images' addresses took more than {FETCH_SECONDS:.0f} seconds")
        return bytes(content)

    def _public_address(self, host: str) -> str:
        try:
            addresses = [ipaddress.ip_address(address) for address in self._resolve(host)]
        except (OSError, UnicodeError, ValueError) as error:
            raise UserError(f"the image's host {host[:100]!r} is not known") from error
        if not addresses or not all(map(is_public, addresses)):
            raise UserError(f"the image's host {host[:100]!r} has an address that is not public")
        return str(addresses[0])


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to the public internet, and so does the IPv4 address that it stands for, if any."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if address in _TRANSLATED_NETWORK:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast
