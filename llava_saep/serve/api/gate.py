"""What every request passes before anything reads it: the name it asks for, its key, and the counters."""

import ipaddress
import logging
import re
import secrets

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_saep.serve.api.errors import ApiError, internal_error, too_fast
from llava_saep.serve.api.metrics import Metrics
from llava_saep.serve.api.settings import ApiSettings
from llava_saep.serve.rate import RequestRate, client_name

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key: what watches a server needs to know nothing else."""

_CLIENT_LEFT = 499


class Gate:
    """ASGI middleware; puts the client's name for the rate limit into `scope["client_name"]`."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, metrics: Metrics):
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._failures = RequestRate(settings.limits.max_requests_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with what is wrong."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = [_CLIENT_LEFT]

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        with self.metrics.in_progress.track_inprogress():
            try:
                await self._answer(scope, receive, send_and_note, status)
            finally:
                self.metrics.count_request(scope["path"], status[0])

    async def _answer(self, scope: Scope, receive: Receive, send: Send, status: list[int]) -> None:
        try:
            self._check(scope)
            await self.app(scope, receive, send)
        except ApiError as error:
            await error.to_response()(scope, receive, send)
        except ClientDisconnect:
            status[0] = _CLIENT_LEFT
        except Exception:
            error_id = secrets.token_hex(6)
            logger.exception("internal error %s", error_id)
            if status[0] == _CLIENT_LEFT:  # nothing was sent yet
                await internal_error(error_id).to_response()(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        client = client_name(scope["client"][0] if scope.get("client") else "")
        if self.settings.local_names_only and not _is_local(headers.getlist("host")):
            message = "this server answers requests for localhost alone; a proxy must send Host: 127.0.0.1"
            raise ApiError(403, message, code="unknown_host")
        scope["client_name"] = client
        if self.settings.keys and scope["path"] not in OPEN_PATHS:
            key = self.settings.keys.identify(headers.get("authorization"))
            if key is None:
                raise self._wrong_key(client)
            scope["client_name"] = f"key {key}"

    def _wrong_key(self, client: str) -> ApiError:
        seconds = self._failures.seconds_to_wait(client)
        if seconds > 0:
            return too_fast("too many requests without a valid key", seconds=seconds)
        return ApiError(
            401,
            "the key is missing or wrong; send it as Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _is_local(hosts: list[str]) -> bool:
    """Whether a Host header names this machine. Names are not looked up: a look-up is what DNS rebinding needs."""
    if len(hosts) != 1:
        return False
    name = re.sub(r":\d*$", "", hosts[0].strip().lower())
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
