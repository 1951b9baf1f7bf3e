"""What stands between the network and Gradio: bounded bodies, and headers that tell the browser what to trust."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from llava_saep.errors import UserError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = {
    # Gradio's page has scripts and styles inside it, and compiles functions from text.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


_API = "/gradio_api/"
_USED = ("queue/", "run/predict", "upload", "heartbeat/", "file=", "cancel", "reset", "login_check", "startup-events")
"""What the page asks for below `_API`. Of the rest some takes files too, and some keeps what sessions hold."""

_LEAST_FILE_BYTES = 32_768
"""What a file counts at least: many small ones fill a disk and slow the count."""

_ABANDONED_SECONDS = 600.0


class UploadRoom:
    """What the page has received and drawn, and how much of it there may be. Thread-safe.

    Args:
        folder: where Gradio keeps such files, for hours.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._lock = threading.Lock()

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether more may come."""
        with self._lock:
            return self._count() + num_bytes <= self.max_bytes

    def check_room(self) -> None:
        """Raise UserError where there is no room for another drawing."""
        if not self.has_room_for(_LEAST_FILE_BYTES):
            raise UserError("The server has no room for more pictures; try again later.")

    def _count(self) -> int:
        self._clear_abandoned()
        return sum(_num_bytes(path) for path in self.folder.rglob("*"))

    def _clear_abandoned(self) -> None:
        """Remove what was left of uploads that broke off, which Gradio forgets."""
        for path in self.folder.glob("tmp*"):
            try:
                if path.is_file() and path.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:  # it became a whole upload this moment
                pass


class Protection:
    """ASGI middleware: refuses bodies above a size with 413, read or announced, uploads with 507 where the disk has
    enough of them, and what the page does not use with 404; adds `HEADERS` to all answers.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        max_request_bytes: int,
        uploads: UploadRoom,
    ):
        self.app = app
        self.max_request_bytes = max_request_bytes
        self.uploads = uploads
        self._arriving_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self.max_request_bytes)
        if _announced_bytes(scope) > self.max_request_bytes:
            await exchange.refuse_size()
            return
        if not _is_used(scope["path"]):
            await exchange.refuse(404, "the page has nothing there")
            return
        if scope["path"].rstrip("/").endswith("/upload"):
            await self._receive_upload(scope, exchange)
            return
        await self._pass_on(scope, exchange)

    async def _receive_upload(self, scope: Scope, exchange: "_Exchange") -> None:
        """Pass an upload on where there is room for it beside those that are arriving."""
        num_bytes = _announced_bytes(scope) or self.max_request_bytes
        self._arriving_bytes += num_bytes
        try:
            if await asyncio.to_thread(self.uploads.has_room_for, self._arriving_bytes):
                await self._pass_on(scope, exchange)
            else:
                await exchange.refuse(507, "the server has no room for more pictures; try again later")
        finally:
            self._arriving_bytes -= num_bytes

    async def _pass_on(self, scope: Scope, exchange: "_Exchange") -> None:
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except _TooLargeError:
            await exchange.refuse_size()


class _TooLargeError(Exception):
    pass


class _Exchange:
    """One request and its answer."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int):
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._received = 0
        self._has_begun = False
        self._is_refused = False

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            await self.refuse_size()  # here, since what reads the body may answer the error in words of its own
            raise _TooLargeError
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            self._has_begun = True
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await self._send(message)

    async def refuse_size(self) -> None:
        await self.refuse(413, f"the request has more than {self._max_bytes:,} bytes")

    async def refuse(self, status: int, message: str) -> None:
        if self._has_begun:
            return
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": message.encode()})
        self._is_refused = True


def _num_bytes(path: Path) -> int:
    try:
        return max(path.stat().st_size, _LEAST_FILE_BYTES) if path.is_file() else 0
    except OSError:  # cleared away this moment
        return 0


def _is_used(path: str) -> bool:
    _, is_api, name = path.partition(_API)
    return not path.startswith("/monitoring") and (not is_api or name.startswith(_USED))


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
