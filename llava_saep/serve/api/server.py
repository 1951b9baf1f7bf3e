"""One process that serves an application: uvicorn, with patience for nobody who sends half a request."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_saep.errors import UserError

HEAD_SECONDS = 15.0
"""The head of a request must have come by then."""

READING_SECONDS = 30.0
"""A client that takes nothing of its answer for so long is cut off: the answer would hold its place for ever."""

_KEEP_ALIVE_SECONDS = 5
_SHUTDOWN_SECONDS = 30
"""Answers in the making get that long to end after SIGTERM; then they are cut off."""

_MAX_HEAD_BYTES = 64 * 1024
_MAX_CONNECTIONS = 512


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 on which a connection is closed that does not come to the end of a request's head, or reads no answer.

    h11 rather than httptools, which lets a head grow without limit.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Go on; the clock runs from a head's first byte to its last."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        super().connection_lost(exc)
        self._stop_clock()
        self._stop_reading_clock()

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read as fast as it is answered."""
        super().pause_writing()
        # Not close(), which waits until everything is read.
        self._reading_timer = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        self._stop_reading_clock()

    def _watch_head(self) -> None:
        has_whole_head = self.cycle is not None and not self.cycle.response_complete
        if has_whole_head or self.transport.is_closing():
            self._stop_clock()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_reading_clock(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None


class AnnouncingServer(uvicorn.Server):
    """Says when it can be reached, which is not before it listens.

    Args:
        on_ready: called then.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]):
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)
        self._on_ready()


def build_server(
    app: FastAPI, *, trusted_proxies: Sequence[str] = (), on_ready: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """Make a server that waits to be run.

    Args:
        on_ready: called when it can be reached.
        trusted_proxies: addresses whose X-Forwarded-For header says who the client is; any client could write one.
    """
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        log_level="error",  # else each piece of garbage that arrives is a line
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    return AnnouncingServer(config, on_ready)


def run_server(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, and let answers in the making end.

    Raises:
        UserError: somebody else began to listen at the address since it was bound.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    if threading.current_thread() is threading.main_thread():
        # One that comes before uvicorn listens for signals is not lost; and uvicorn raises the signal once more when it
        # has ended, when the default would kill the process.
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(server, "should_exit", True))
    try:
        server.run(sockets=[bound])
    except OSError as error:
        raise UserError(f"cannot listen at port {bound.getsockname()[1]}: {error}") from error
