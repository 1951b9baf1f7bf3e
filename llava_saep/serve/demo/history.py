"""Chats that outlive a reload of the page: kept on the server, one folder per visitor, found by a random token.

The token is in the visitor's browser alone; the folder is named by a hash of it, so that reading the server's folders
gives nobody a token. Without a folder of its own the history ends with the server.
"""

import hashlib
import json
import logging
import re
import secrets
import shutil
import threading
from pathlib import Path

from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.pictures import PictureStore, PixelsInMemory, write_privately
from llava_saep.serve.limits import Limits

logger = logging.getLogger(__name__)

MAX_CHATS = 50
"""Chats of one visitor; the oldest make room."""

QUESTION_SECONDS = 3600.0
"""Longer than any question waits and is answered; until then, its pictures are of no chat yet."""

_TOKEN = re.compile(r"[0-9a-f]{64}")
_CHAT_ID = re.compile(r"[0-9a-f]{16}")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_hex(32)


def is_token(value: object) -> bool:
    """Whether a browser's value has the form of a token."""
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None


class Visitor:
    """The chats and pictures of one browser (of one user, where users have names)."""

    def __init__(self, folder: Path, previews: Path, limits: Limits, pixels: PixelsInMemory):
        self.folder = folder
        self.pictures = PictureStore(folder / "pictures", previews, limits, pixels)
        self._chats = folder / "chats"

    def conversations(self) -> list[Conversation]:
        """All chats, the one that was changed last first; a damaged file is left out with a warning."""
        found = []
        for path in self._files():
            try:
                found.append(Conversation.from_json(json.loads(path.read_text(encoding="utf-8"))))
            except _UNREADABLE as error:
                logger.warning("%s is no saved chat and is left out: %s", path, error)
        return found

    def conversation(self, chat_id: str) -> Conversation | None:
        """One chat by its name; None where there is none."""
        return next((chat for chat in self.conversations() if chat.chat_id == chat_id), None)

    def save(self, conversation: Conversation) -> None:
        """Keep a chat, and let the oldest go where there are too many."""
        if not conversation.messages:
            return
        text = json.dumps(conversation.to_json(), ensure_ascii=False)
        write_privately(self._chats / f"{conversation.chat_id}.json", text.encode())
        for path in self._files()[MAX_CHATS:]:
            path.unlink(missing_ok=True)

    def forget_oldest(self) -> bool:
        """Forget the chat that was changed first, unless it is the only one; returns whether there was another."""
        *others, oldest = self._files() or [None]
        if others:
            oldest.unlink(missing_ok=True)
            self.forget_unused_pictures()
        return bool(others)

    def forget_unused_pictures(self, *, min_age_seconds: float = QUESTION_SECONDS) -> None:
        """Forget the pictures that no chat shows, but for those that were sent just now."""
        shown = {name for chat in self.conversations() for name in chat.pictures}
        self.pictures.keep_only(shown, min_age_seconds=min_age_seconds)

    def delete(self, chat_id: str, *, min_age_seconds: float = 0.0) -> None:
        """Forget a chat, and the pictures that no other one shows; those of less than this age stay."""
        if _CHAT_ID.fullmatch(chat_id):
            (self._chats / f"{chat_id}.json").unlink(missing_ok=True)
        self.forget_unused_pictures(min_age_seconds=min_age_seconds)

    def num_bytes(self) -> int:
        """Size of all files, previews included."""
        folders = (self.folder, self.pictures.previews)
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def _files(self) -> list[Path]:
        return sorted(self._chats.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


class History:
    """All visitors' chats in one folder, up to a total size.

    Args:
        folder: kept across restarts, or temporary.
        previews: temporary folder that the page may serve files from.
        max_bytes: above it, the visitors that have been away longest are forgotten, and of one alone the oldest chats.
    """

    def __init__(self, folder: Path, previews: Path, limits: Limits, *, max_bytes: int):
        self.folder = folder
        self.previews = previews
        self.limits = limits
        self.max_bytes = max_bytes
        self.pixels = PixelsInMemory(limits.max_pixels_in_memory)
        self._lock = threading.Lock()

    def visitor(self, token: str, user: str | None = None) -> Visitor:
        """The visitor with this token; a name of the user keeps two users of one browser apart.

        Raises:
            ValueError: it is no token.
        """
        if not is_token(token):
            raise ValueError("expected a token of `new_token`")
        name = hashlib.sha256(f"{token}\0{user or ''}".encode()).hexdigest()
        return self._visitor_of(self.folder / name)

    def _visitor_of(self, folder: Path) -> Visitor:
        return Visitor(folder, self.previews / folder.name, self.limits, self.pixels)

    def make_room(self, keeping: Visitor) -> None:
        """Forget what is unused, then the visitors that have been away longest until the total size fits.

        Args:
            keeping: stays, but for its oldest chats where it is too large alone.
        """
        with self._lock:
            keeping.forget_unused_pictures()
            folders = [path for path in self.folder.glob("*") if path.is_dir()]
            sizes = {path: self._visitor_of(path).num_bytes() for path in folders}
            total = sum(sizes.values())
            for path in sorted(folders, key=_last_change):
                if total <= self.max_bytes:
                    return
                if path != keeping.folder:
                    logger.warning("the saved chats exceed %d bytes; those of one visitor are removed", self.max_bytes)
                    shutil.rmtree(path, ignore_errors=True)
                    shutil.rmtree(self.previews / path.name, ignore_errors=True)
                    total -= sizes[path]
            while keeping.num_bytes() > self.max_bytes and keeping.forget_oldest():
                logger.warning("the chats of one visitor exceed %d bytes; the oldest is removed", self.max_bytes)


def _last_change(folder: Path) -> float:
    chats = folder / "chats"
    return (chats if chats.is_dir() else folder).stat().st_mtime
