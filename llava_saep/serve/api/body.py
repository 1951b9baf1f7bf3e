"""Bodies of requests: read piece by piece within limits, and parsed without letting JSON grow in memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from starlette.requests import Request

from llava_saep.serve.api.errors import ApiError, overloaded

BODY_SECONDS = 60.0
"""A body must have come by then; a client that sends a byte now and then would hold memory for ever."""

_DISCARD_SECONDS = 1.0
_BODIES_IN_MEMORY = 4
"""Bodies of the largest size that may be read or decoded at the same time."""

_MAX_STRUCTURE = 50_000
"""Commas and opening brackets beyond the characters that a prompt may have. An empty list takes two bytes of JSON and
64 of memory; an image's base64 holds none of these characters, so honest requests stay far below."""


class BodyReader:
    """Reads the JSON bodies of one application's requests.

    Args:
        max_bytes: of one body.
        max_prompt_characters: which may all be commas and brackets.
    """

    def __init__(self, max_bytes: int, max_prompt_characters: int):
        self.max_bytes = max_bytes
        self._max_structure = max_prompt_characters + _MAX_STRUCTURE
        self._free_bytes = _BODIES_IN_MEMORY * max_bytes

    @asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON object that a request brings; its memory counts as taken until the block ends.

        Raises:
            ApiError: not JSON, not an object, too large, or not there in time; or other bodies fill the memory.
            ClientDisconnect: the client left.
        """
        _check_headers(request)
        taken = [0]
        try:
            body = await self._read(request, taken)
            yield await asyncio.to_thread(parse_json, body, self._max_structure)
        finally:
            self._free_bytes += taken[0]

    async def _read(self, request: Request, taken: list[int]) -> bytearray:
        body = bytearray()
        if _content_length(request) > self.max_bytes:
            await self._refuse_size(request)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self.max_bytes:
                        body.clear()
                        await self._refuse_size(request)
                    if len(chunk) > self._free_bytes:
                        raise overloaded("too many large requests at once; try again", seconds=5)
                    self._free_bytes -= len(chunk)
                    taken[0] += len(chunk)
                    body += chunk
        except TimeoutError as error:
            message = f"the request's body did not come within {BODY_SECONDS:.0f} seconds"
            raise ApiError(408, message, headers={"Connection": "close"}) from error
        return body

    async def _refuse_size(self, request: Request) -> NoReturn:
        await _discard(request)
        raise ApiError(
            413,
            f"the request's body has more than {self.max_bytes:,} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


async def _discard(request: Request) -> None:
    """Read on for a moment: a client that is still sending when its connection closes may not see the answer."""
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await request.receive()).get("more_body"):
                pass
    except TimeoutError:
        pass


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Nor does a web page of another origin get to send this type without asking first, which nothing here answers.
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:100]!r}, expected application/json", code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = f"Content-Encoding is {encoding[:100]!r}; send the body uncompressed"
        raise ApiError(415, message, code="unsupported_media_type")


def _content_length(request: Request) -> int:
    value = request.headers.get("content-length", "0")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else 0


def parse_json(body: bytes | bytearray, max_structure: int) -> dict[str, Any]:
    """Parse a body that must hold one JSON object.

    Args:
        max_structure: commas, opening brackets and braces in all, inside of texts too.
    Raises:
        ApiError: it does not, or is nested too deeply.
    """
    if sum(body.count(character) for character in b",[{") > max_structure:
        raise _not_json("it has too many elements")
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _not_json("it is not UTF-8") from error
    except RecursionError as error:
        raise _not_json("it is nested too deeply") from error
    except ValueError as error:
        raise _not_json(str(error)) from error
    if not isinstance(parsed, dict):
        raise _not_json(f"expected an object, got {type(parsed).__name__}")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _not_json(reason: str) -> ApiError:
    return ApiError(400, f"the request's body cannot be used: {reason}", code="invalid_json")
