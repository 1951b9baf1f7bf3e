"""What stands between the network and Gradio: bounded bodies, and headers that tell the browser what to trust."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

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


class Protection:
    """ASGI middleware: refuses bodies above a size with 413, read or announced, and uploads with 507 where the disk has
    enough of them; adds `HEADERS` to all answers.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        max_request_bytes: int,
        upload_folder: Path,
        max_uploads_bytes: int,
    ):
        self.app = app
        self.max_request_bytes = max_request_bytes
        self.upload_folder = upload_folder
        self.max_uploads_bytes = max_uploads_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self.max_request_bytes)
        if _announced_bytes(scope) > self.max_request_bytes:
            await exchange.refuse_size()
            return
        if scope["path"].rstrip("/").endswith("/upload") and self._has_no_room():
            await exchange.refuse(507, "the server has no room for more pictures; try again later")
            return
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except _TooLargeError:
            await exchange.refuse_size()

    def _has_no_room(self) -> bool:
        return sum(_num_bytes(path) for path in self.upload_folder.rglob("*")) > self.max_uploads_bytes


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
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # cleared away this moment
        return 0


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
