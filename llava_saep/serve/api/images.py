"""Images of a chat completion request: from data: URLs, and from https addresses where some are allowed."""

import base64
import binascii
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.api.fetching import ImageFetcher
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image, read_untrusted_size

_DECODING_THREADS = 2
"""Images decoded at the same time: each holds its pixels twice or thrice for a moment."""

_WHITE_SPACE = str.maketrans("", "", " \t\r\n")


class ImageSource:
    """Turns the addresses in a request into images.

    Args:
        limits: of images.
        allowed_hosts: whose https images may be fetched.
    """

    def __init__(self, limits: Limits, allowed_hosts: frozenset[str]):
        self.limits = limits
        self._fetcher = ImageFetcher(allowed_hosts, max_bytes=limits.max_image_bytes)
        self._decoding = threading.Semaphore(_DECODING_THREADS)

    def load(self, messages: list[dict[str, Any]], take_pixels: Callable[[int], None]) -> list[dict[str, Any]]:
        """Return messages with images in place of their addresses.

        Args:
            take_pixels: called with an image's pixels before it is decoded; its errors are passed on.
        Raises:
            UserError: an address that is not allowed, or no image that is.
        """
        deadline = self._fetcher.deadline()

        def load(address: str) -> Image.Image:
            data = self._read(address, deadline)
            with self._decoding:  # for the head too: what stands in it can cost more than the pixels
                size = read_untrusted_size(data, self.limits)
                take_pixels(size.width * size.height)
                return open_untrusted_image(data, self.limits)

        return [message | {"content": _with_images(message["content"], load)} for message in messages]

    def _read(self, address: str, deadline: float) -> bytes:
        if address[:5].lower() == "data:":
            return decode_data_url(address, self.limits.max_image_bytes)
        return self._fetcher.fetch(address, deadline)


def _with_images(content: str | list[dict[str, Any]], load: Callable[[str], Image.Image]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [part | {"image": load(part["image"])} if part["type"] == "image" else part for part in content]


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Return the bytes of a base64 data: URL, whatever type it names.

    Raises:
        UserError: it is none, or too large.
    """
    head, comma, encoded = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError("image_url.url: expected data:image/...;base64,...")
    if len(encoded) * 3 // 4 > max_bytes + 3:
        raise UserError(f"the image has about {len(encoded) * 3 // 4:,} bytes, at most {max_bytes:,} are allowed")
    try:
        return base64.b64decode(encoded.translate(_WHITE_SPACE).encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError("image_url.url: what follows base64, is not base64") from error
