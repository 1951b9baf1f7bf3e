"""What clients are told when something is refused or fails, in the form that OpenAI's clients read."""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_MAX_MESSAGE_CHARACTERS = 500


class ApiError(Exception):
    """A request that is not answered, with the status and words that its client gets.

    Args:
        message: for the client: nothing of this machine, no trace.
        kind: OpenAI's error type.
        param: the field of the request that is wrong.
        code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        message = self.message
        if len(message) > _MAX_MESSAGE_CHARACTERS:
            message = message[:_MAX_MESSAGE_CHARACTERS] + "..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def to_response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def overloaded(message: str, *, seconds: float) -> ApiError:
    """503: too much is asked at the moment, by all clients together."""
    return ApiError(
        503, message, kind="server_error", code="overloaded", headers={"Retry-After": str(math.ceil(seconds))}
    )


def too_fast(message: str, *, seconds: float) -> ApiError:
    """429: one client asks too often."""
    headers = {"Retry-After": str(math.ceil(seconds))}
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def internal_error(error_id: str) -> ApiError:
    """500: the log says more under this id; the client is told nothing else."""
    return ApiError(
        500, f"internal error {error_id}; the server's log says more", kind="server_error", code="internal_error"
    )
