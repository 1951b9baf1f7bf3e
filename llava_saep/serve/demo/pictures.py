"""Pictures that visitors sent, as files that are named by their content; each visitor has a folder."""

import hashlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.limits import Limits
from llava_saep.serve.untrusted import open_untrusted_image, read_untrusted_size

PREVIEW_SIDE = 768
"""Longer side of a picture in the chat, in pixels."""


def write_privately(path: Path, data: bytes) -> None:
    """Write a file for its owner alone, which is there under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number, name = tempfile.mkstemp(dir=path.parent)  # its mode is 0600
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class PixelsInMemory:
    """How many pixels are decoded, or about to be, for all visitors together. Thread-safe."""

    def __init__(self, most: int):
        self.most = most
        self._num_held = 0
        self._lock = threading.Lock()

    @contextmanager
    def held(self, num_pixels: int) -> Iterator[None]:
        """Count pixels as held inside the block.

        Raises:
            UserError: they would be too many.
        """
        with self._lock:
            if self._num_held + num_pixels > self.most:
                raise UserError(
                    "The pictures of all questions that are being answered fill the server's memory; ask again in a "
                    "moment, or with smaller pictures."
                )
            self._num_held += num_pixels
        try:
            yield
        finally:
            with self._lock:
                self._num_held -= num_pixels


class PictureStore:
    """The pictures of one visitor.

    Args:
        pixels: of all visitors together.
        folder: of this visitor; need not exist.
        previews: where small versions for the chat are written; the page may serve files from there.
    """

    def __init__(self, folder: Path, previews: Path, limits: Limits, pixels: PixelsInMemory):
        self.folder = folder
        self.previews = previews
        self.limits = limits
        self.pixels = pixels

    def add(self, data: bytes) -> str:
        """Check and keep a picture that was sent, as it is, and return its name.

        Raises:
            UserError: as `open_untrusted_image`, or other pictures fill the memory.
        """
        height, width = read_untrusted_size(data, self.limits)
        with self.pixels.held(height * width):
            open_untrusted_image(data, self.limits)
        name = hashlib.sha256(data).hexdigest()
        path = self.folder / name
        if path.exists():
            path.touch()  # see `keep_only`
        else:
            write_privately(path, data)
        return name

    def add_upload(self, path: str | Path) -> str:
        """Check and keep a file that the page has received; errors as `add`, without the path."""
        try:
            with open(path, "rb") as file:
                data = file.read(self.limits.max_image_bytes + 1)
        except OSError as error:
            raise UserError("The uploaded picture is no longer there; add it again.") from error
        return self.add(data)

    def read(self, name: str) -> bytes:
        """Return a picture as it was sent.

        Raises:
            UserError: it has been removed meanwhile.
        """
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UserError("A picture of this chat has been removed from the server; start a new chat.") from error

    def open(self, name: str) -> Image.Image:
        """Decode a picture to RGB, whose pixels the caller counts; errors as `read`."""
        return open_untrusted_image(self.read(name), self.limits)

    @contextmanager
    def decoded(self, name: str) -> Iterator[Image.Image]:
        """A picture as `open` gives it, for the time of the block.

        Raises:
            UserError: it has been removed meanwhile, or other pictures fill the memory.
        """
        with self.pixels.held(self.num_pixels(name)):
            yield self.open(name)

    def num_pixels(self, name: str) -> int:
        """Count a picture's pixels without decoding it; errors as `read`."""
        height, width = read_untrusted_size(self.read(name), self.limits)
        return height * width

    def preview(self, name: str) -> Path:
        """A WebP file of at most PREVIEW_SIDE pixels for the chat; errors as `decoded`."""
        path = self.previews / f"{name}.webp"
        if not path.exists():
            file = io.BytesIO()
            with self.decoded(name) as image:
                image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
                image.save(file, format="WEBP", quality=90)
            write_privately(path, file.getvalue())
        return path

    def as_upload(self, name: str) -> Path:
        """The picture as it was sent, in a file that the page may put into a field again; errors as `read`."""
        data = self.read(name)
        with Image.open(io.BytesIO(data)) as image:
            path = self.previews / f"{name}.{(image.format or 'png').lower()}"
        if path.exists():
            path.touch()  # see `keep_only`
        else:
            write_privately(path, data)
        return path

    def keep_only(self, names: set[str], *, min_age_seconds: float = 0.0) -> None:
        """Remove all others, and what was made of them.

        Args:
            min_age_seconds: those that were sent later stay, since a question with them may be being answered.
        """
        before = time.time() - min_age_seconds
        for folder in (self.folder, self.previews):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.name.partition(".")[0] not in names and path.stat().st_mtime <= before:
                    path.unlink(missing_ok=True)


def engine_messages(conversation: Conversation, pictures: PictureStore) -> list[dict[str, Any]]:
    """A conversation as an engine takes it, its pictures decoded.

    Raises:
        UserError: a picture has been removed meanwhile.
    """
    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for message in conversation.messages:
        parts = [{"type": "image", "image": pictures.open(name)} for name in message.pictures]
        if message.role == "assistant":
            messages.append({"role": "assistant", "content": message.text})
        else:
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": message.text}]})
    return messages
