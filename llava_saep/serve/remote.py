"""RemoteEngine: answers of a server with OpenAI's protocol (`/v1/chat/completions`), as an engine of this process.

`llava-saep serve` is such a server, and so are others; what only ours tells of a model is marked as unknown elsewhere.
Images travel as data URLs. Closing an answer hangs up, which is what stops the server's work on it.
"""

import base64
import contextlib
import io
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import (
    AnswerStatistics,
    AnswerStream,
    Engine,
    GenerationOptions,
    Message,
    ModelDescription,
)
from llava_saep.generation.streams import NOT_AT_ITS_END, PieceTimes
from llava_saep.serve.access import API_KEY_VARIABLE, is_loopback

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""What a description says of a property that the server does not tell."""
_MAX_LOSSLESS_BYTES = 12_000_000
"""Size of a PNG above which an image that has no file any more is sent as JPEG; servers limit an image's bytes."""
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is, and how to speak with it.

    Args:
        url: the server's address; with or without the ending /v1.
        api_key: sent as a bearer token; None: none is sent.
        connect_seconds: longest wait for a connection.
        silence_seconds: longest wait for the next piece of an answer; waiting for the model included.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    connect_seconds: float = 10.0
    silence_seconds: float = 600.0

    def __post_init__(self) -> None:
        url = httpx.URL(self.url) if "://" in self.url else None
        if url is None or url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"--api {self.url}: expected the address of a server, such as http://127.0.0.1:8000")
        if self.api_key is not None and not self.api_key.isprintable():
            raise UserError("the API key has characters that cannot be sent; a key is one line of printable text")
        if self.api_key is not None and url.scheme == "http" and not is_loopback(url.host):
            logger.warning("the API key goes to %s unencrypted; use an https address", url.host)

    def client(self) -> httpx.Client:
        """Open a client; certificates are verified, and redirections are not followed, so that the key stays here."""
        base_url = self.url.rstrip("/").removesuffix("/v1")
        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        timeout = httpx.Timeout(self.silence_seconds, connect=self.connect_seconds)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        return httpx.Client(base_url=base_url, headers=headers, timeout=timeout, limits=limits)


def read_api_key(file: str | Path | None) -> str | None:
    """Read a key from the first line of a file, or where none is named from the environment; None: there is none.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(API_KEY_VARIABLE, "").strip() or None
    try:
        lines = Path(file).read_text().strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: cannot be read: {error}") from error
    if not lines:
        raise UserError(f"--api-key-file {file}: the file is empty; its first line must be the key")
    return lines[0].strip()


def remote_engines(endpoint: Endpoint) -> "dict[str, RemoteEngine]":
    """Connect to every model that a server has, by its name there.

    Raises:
        UserError: no such server, no access, or no models.
    """
    client = endpoint.client()
    try:
        entries = _list_models(client, endpoint)
        return {str(entry["id"]): RemoteEngine(endpoint, _description(entry)) for entry in entries}
    finally:
        client.close()


class RemoteEngine(Engine):
    """One model of a server.

    Args:
        description: of the model; its model_id is what the server calls it. `remote_engines` asks the server.
    """

    def __init__(self, endpoint: Endpoint, description: ModelDescription):
        self.endpoint = endpoint
        self._description = description
        self._client = endpoint.client()

    @property
    def description(self) -> ModelDescription:
        """What the server told of the model."""
        return self._description

    def stream(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        max_seconds: float | None = None,
    ) -> AnswerStream:
        """See `Engine.stream`; returns when the server has taken the question.

        Args:
            max_seconds: counted from there, so that waiting at the server is included.
        Raises:
            UserError: also whatever the server refuses, in its words, and where it cannot be reached.
        """
        options = options or GenerationOptions()
        if options.num_beams > 1:
            raise UserError(f"num_beams is {options.num_beams}; answers that come piece by piece have none")
        body = _request_body(self._description.model_id, messages, options)
        asked = time.monotonic()
        try:
            request = self._client.build_request("POST", "/v1/chat/completions", json=body)
            response = self._client.send(request, stream=True)
        except RuntimeError as error:  # httpx's word for a client that was closed
            raise UserError(f"{self._description.model_id} was disconnected; connect again to ask it") from error
        except httpx.HTTPError as error:
            logger.warning("%s: %s", self.endpoint.url, error)
            raise UserError(f"the model's server cannot be reached ({_reason(error)})") from error
        if response.status_code != httpx.codes.OK:
            raise UserError(_refusal(response))
        return RemoteAnswerStream(response, asked, max_seconds)

    def close(self) -> None:
        """Hang up on all answers."""
        self._client.close()


class RemoteAnswerStream(AnswerStream):
    """An answer that comes over the network. Left alone it is closed.

    Args:
        response: a stream of server-sent events, open.
        asked: monotonic time of the question.
    """

    def __init__(self, response: httpx.Response, asked: float, max_seconds: float | None):
        self._response = response
        self._chunks = _chunks(response)
        self._times = PieceTimes(asked)
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._hung_up: str | None = None
        self._has_ended = False
        self._timer: threading.Timer | None = None
        if max_seconds is not None:
            self._timer = threading.Timer(max_seconds, self._hang_up, ("time_limit",))
            self._timer.daemon = True
            self._timer.start()

    def __next__(self) -> str:
        """Wait for the next piece of text.

        Raises:
            UserError: the server reports an error, or is gone before the answer's end.
        """
        try:
            while not self._has_ended:
                piece = self._read()
                if piece:
                    return piece
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            if self._hung_up is None:
                self._finish("cancelled")
                logger.warning("an answer broke off: %s", error)
                raise UserError(f"the model's server broke the answer off ({_reason(error)})") from error
            self._finish(self._hung_up)
        raise StopIteration

    def _read(self) -> str:
        """Take the next event; the text that it brings may be empty."""
        chunk = next(self._chunks, None)
        if chunk is None:
            was_cut = self._finish_reason is None and self._hung_up is None
            self._finish(self._hung_up or self._finish_reason or "cancelled")
            if was_cut:
                raise UserError("the model's server ended the connection before the answer's end")
            return ""
        if "error" in chunk:
            self._finish("cancelled")
            raise UserError(_error_message(chunk) or "the model's server reports an error")
        self._usage = chunk.get("usage") or self._usage
        choice = (chunk.get("choices") or [{}])[0]
        # Ours says in a field of its own what OpenAI has no word for.
        self._finish_reason = choice.get("finish_details") or choice.get("finish_reason") or self._finish_reason
        piece = (choice.get("delta") or {}).get("content") or ""
        if piece:
            self._times.note_piece()
        return piece

    def close(self) -> None:
        """Hang up; the server stops its work when it notices, which is at its next piece at the latest."""
        self._hang_up("cancelled")
        self._finish(self._hung_up or "cancelled")

    def _hang_up(self, reason: str) -> None:
        if self._has_ended or self._hung_up is not None:
            return
        self._hung_up = reason
        # A thread that waits in recv() is woken by a shutdown, not by a close.
        stream = self._response.extensions.get("network_stream")
        connection = stream.get_extra_info("socket") if stream is not None else None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _finish(self, reason: str) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._finish_reason = reason
        if self._timer is not None:
            self._timer.cancel()
        with contextlib.suppress(httpx.HTTPError, OSError):
            self._response.close()

    @property
    def statistics(self) -> AnswerStatistics:
        """What the answer took: tokens as the server counts them, times as seen from here, network included.

        A server's counts come last: of an answer that was cut short only the pieces are known.
        """
        if not self._has_ended:
            raise RuntimeError(NOT_AT_ITS_END)
        prompt = self._usage.get("prompt_tokens_details") or {}
        return AnswerStatistics(
            prompt_tokens=int(self._usage.get("prompt_tokens") or 0),
            image_tokens=int(prompt.get("image_tokens") or 0),
            cached_tokens=int(prompt.get("cached_tokens") or 0),
            completion_tokens=int(self._usage.get("completion_tokens") or self._times.num_pieces),
            finish_reason=_known_reason(self._finish_reason),
            waiting_seconds=0.0,
            first_token_seconds=self._times.first_piece_seconds,
            seconds=self._times.seconds,
        )

    def __del__(self) -> None:
        self.close()


def _known_reason(reason: str | None) -> Any:
    return reason if reason in ("stop", "length", "cancelled", "time_limit") else "stop"


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield what the events of a stream hold, up to `[DONE]`; comments and other fields of the protocol are left out.

    Raises:
        httpx.DecodingError: an event holds no JSON object.
    """
    for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise httpx.DecodingError(f"{error} in {data[:80]!r}") from error
        if not isinstance(chunk, dict):
            raise httpx.DecodingError(f"expected an object, got {data[:80]!r}")
        yield chunk


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield the lines of a stream of events. (httpx would also end one at U+2028 and the like, which JSON may hold.)"""
    pending = b""
    for received in response.iter_bytes():
        *lines, pending = (pending + received).split(b"\n")
        yield from lines
    yield pending


def _request_body(model: str, messages: Sequence[Message], options: GenerationOptions) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [_request_message(message) for message in messages],
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body if options.seed is None else {**body, "seed": options.seed}


def _request_message(message: Message) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [_request_part(part) for part in content]
    return {"role": message["role"], "content": content}


def _request_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": image_data_url(part["image"])}}


def image_data_url(image: Image.Image | str | Path) -> str:
    """Encode an image: a file's bytes as they are, where its format is one that every server takes, else as PNG.

    Raises:
        UserError: the file is missing or no image.
    """
    if isinstance(image, Image.Image):
        return _data_url(*_encode(image))
    try:
        with Image.open(image) as opened:
            if opened.format in _SENT_AS_THEY_ARE:
                return _data_url(Path(image).read_bytes(), _SENT_AS_THEY_ARE[opened.format])
            return _data_url(*_encode(opened))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        logger.info("image %s: %s", image, error)
        raise UserError(f"{Path(image).name}: the file cannot be read as an image") from error


def _encode(image: Image.Image) -> tuple[bytes, str]:
    image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    if buffer.tell() <= _MAX_LOSSLESS_BYTES:
        return buffer.getvalue(), "image/png"
    logger.warning("an image of %d x %d pixels is sent as JPEG: its PNG is too large", image.width, image.height)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "image/jpeg"


def _data_url(data: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(data).decode()}"


def _list_models(client: httpx.Client, endpoint: Endpoint) -> list[dict[str, Any]]:
    try:
        response = client.get("/v1/models", timeout=endpoint.connect_seconds)
    except httpx.HTTPError as error:
        raise UserError(f"--api {endpoint.url}: {_reason(error)}") from error
    if response.status_code != httpx.codes.OK:
        raise UserError(f"--api {endpoint.url}: {_refusal(response)}")
    try:
        entries = response.json()["data"]
        names = [entry["id"] for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--api {endpoint.url}: /v1/models there is no list of models") from error
    if not names:
        raise UserError(f"--api {endpoint.url}: the server has no model loaded")
    return entries


def _description(entry: dict[str, Any]) -> ModelDescription:
    """Read an entry of /v1/models; ours say of a model what the demo shows of one."""
    return ModelDescription(
        model_id=str(entry["id"]),
        projector=str(entry.get("projector", UNKNOWN)),
        tokens_per_image=int(entry.get("tokens_per_image") or 0),
        context_length=entry.get("context_length"),
        template=str(entry.get("template", UNKNOWN)),
        takes_system=bool(entry.get("takes_system", True)),
        device=str(entry.get("device", UNKNOWN)),
        dtype=str(entry.get("dtype", UNKNOWN)),
    )


def _refusal(response: httpx.Response) -> str:
    """Say in the server's words why it refused, and what to do about it."""
    try:
        response.read()
        message = _error_message(response.json())
    except (httpx.HTTPError, ValueError):
        message = None
    finally:
        response.close()
    message = message or f"the server answers {response.status_code} {response.reason_phrase}"
    if response.status_code in (401, 403):
        return f"{message}; name the server's key with --api-key-file FILE or in {API_KEY_VARIABLE}"
    wait = response.headers.get("retry-after", "")
    if response.status_code in (429, 503) and wait.isdecimal():
        return f"{message}; try again in {wait} seconds"
    return message


def _error_message(body: Any) -> str | None:
    """Find the message in an error of OpenAI's form, or in one of FastAPI's own."""
    error = body.get("error", body.get("detail")) if isinstance(body, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return error[:_MAX_ERROR_CHARACTERS] if isinstance(error, str) and error else None


def _reason(error: Exception) -> str:
    """A few words for what went wrong on the way, without addresses."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate cannot be verified: {cause.verify_message}; SSL_CERT_FILE names further authorities"
    if isinstance(error, httpx.TimeoutException):
        return "it does not answer in time"
    if isinstance(error, httpx.DecodingError):
        return "its reply is malformed"
    if isinstance(error, httpx.ConnectError):
        return "no connection; is the server running, and is the address right?"
    return "the connection failed"
