"""Pictures that visitors sent, as files that are named by their content; each visitor has a folder."""

import hashlib
import io
import os
import tempfile
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


class PictureStore:
    """The pictures of one visitor.

    Args:
        folder: of this visitor; need not exist.
        previews: where small versions for the chat are written; the page may serve files from there.
    """

    def __init__(self, folder: Path, previews: Path, limits: Limits):
        self.folder = folder
        self.previews = previews
        self.limits = limits

    def add(self, data: bytes) -> str:
        """Check and keep a picture that was sent, as it is, and return its name.

        Raises:
            UserError: as `open_untrusted_image`.
        """
        open_untrusted_image(data, self.limits)
        name = hashlib.sha256(data).hexdigest()
        path = self.folder / name
        if not path.exists():
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
        """Decode a picture to RGB; errors as `read`."""
        return open_untrusted_image(self.read(name), self.limits)

    def num_pixels(self, name: str) -> int:
        """Count a picture's pixels without decoding it; errors as `read`."""
        height, width = read_untrusted_size(self.read(name), self.limits)
        return height * width

    def preview(self, name: str) -> Path:
        """A WebP file of at most PREVIEW_SIDE pixels for the chat; errors as `read`."""
        path = self.previews / f"{name}.webp"
        if not path.exists():
            image = self.open(name)
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
            file = io.BytesIO()
            image.save(file, format="WEBP", quality=90)
            write_privately(path, file.getvalue())
        return path

    def as_upload(self, name: str) -> Path:
        """The picture as it was sent, in a file that the page may put into a field again; errors as `read`."""
        data = self.read(name)
        with Image.open(io.BytesIO(data)) as image:
            path = self.previews / f"{name}.{(image.format or 'png').lower()}"
        if not path.exists():
            write_privately(path, data)
        return path

    def keep_only(self, names: set[str]) -> None:
        """Remove all others."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in names:
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
