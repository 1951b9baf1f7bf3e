"""The application: its routes, and the way of a chat completion from the request to the answer."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llava_saep.errors import OverloadedError, UserError
from llava_saep.generation import AnswerStream, Engine
from llava_saep.serve.api.admission import Admission, Ticket
from llava_saep.serve.api.answering import Answering
from llava_saep.serve.api.body import BodyReader
from llava_saep.serve.api.errors import ApiError, internal_error, overloaded, too_fast
from llava_saep.serve.api.gate import Gate
from llava_saep.serve.api.images import ImageSource
from llava_saep.serve.api.metrics import Metrics
from llava_saep.serve.api.requests import ChatRequest, StreamOptions, parse_chat_request
from llava_saep.serve.api.responses import DONE, KEEP_ALIVE, CompletionForm, event, model_card
from llava_saep.serve.api.settings import ApiSettings
from llava_saep.serve.rate import RequestRate

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATHS = ("/v1/chat/completions", "/v1/models", "/health", "/metrics")


def create_app(engines: Mapping[str, Engine], settings: ApiSettings | None = None) -> FastAPI:
    """Make the application.

    Args:
        engines: from the name that clients ask for; looked up at each request. Whoever made them closes them.
        settings: None: the defaults, which ask for no key.
    Returns:
        an ASGI application without state outside of itself; its metrics count its own requests.
    """
    settings = settings or ApiSettings()
    metrics = Metrics(PATHS)
    service = ChatService(engines, settings, metrics)
    # The interactive documentation would load scripts from other hosts.
    app = FastAPI(title="llava-saep", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    started = int(time.time())

    async def list_models(request: Request) -> Response:
        cards = [model_card(engine.description, started) for engine in engines.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(request: Request) -> Response:
        return JSONResponse(model_card(service.engine(request.path_params["model"]).description, started))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def show_metrics(request: Request) -> Response:
        return metrics.to_response()

    app.add_route("/v1/chat/completions", service.create_chat_completion, methods=["POST"])
    app.add_route("/v1/models", list_models, methods=["GET"])
    app.add_route("/v1/models/{model:path}", show_model, methods=["GET"])
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/metrics", show_metrics, methods=["GET"])
    return app


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    message = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).to_response()


class ChatService:
    """Answers chat completion requests.

    Args:
        engines: by the name that clients ask for.
    """

    def __init__(self, engines: Mapping[str, Engine], settings: ApiSettings, metrics: Metrics):
        limits = settings.limits
        self.engines = engines
        self.limits = limits
        self.metrics = metrics
        self._rate = RequestRate(limits.max_requests_per_minute)
        self._bodies = BodyReader(limits.max_request_bytes, limits.max_prompt_characters)
        self._images = ImageSource(limits, settings.allowed_image_hosts)
        self._admission = Admission(limits, settings.answers_at_once, metrics.set_queue)
        num_questions = max(1, len(engines)) * (limits.max_queue + settings.answers_at_once)
        self._readers = ThreadPoolExecutor(num_questions, thread_name_prefix="llava-saep-read")
        self._closers = ThreadPoolExecutor(num_questions, thread_name_prefix="llava-saep-close")

    def engine(self, model_id: str) -> Engine:
        """Return a model's engine.

        Raises:
            ApiError: 404, there is no such model here.
        """
        engine = self.engines.get(model_id)
        if engine is None:
            known = ", ".join(self.engines)
            message = f"the model {model_id[:100]!r} is not here; there is {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return engine

    async def create_chat_completion(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        seconds = self._rate.seconds_to_wait(request.scope["client_name"])
        if seconds > 0:
            limit = self.limits.max_requests_per_minute
            raise too_fast(f"at most {limit} requests a minute are answered; try again later", seconds=seconds)
        # Nothing of the request may stay in this frame: its images' base64 would wait as long as the question.
        answering, form, stream_options = await self._begin(request)
        if stream_options is not None:
            return AnswerResponse(
                answering, _events(answering, form, includes_usage=bool(stream_options.include_usage))
            )
        try:
            return await _while_connected(_whole_answer(answering, form), request.receive)
        finally:
            answering.close()

    async def _begin(self, request: Request) -> tuple[Answering, CompletionForm, StreamOptions | None]:
        """Read a request and put its question to the engine; no stream options: the answer is wanted as a whole."""
        async with self._bodies.reading(request) as fields:
            chat = await asyncio.to_thread(parse_chat_request, fields, self.limits)
            answering = self._ask(chat, self.engine(chat.model))
            try:
                await answering.open()
            except BaseException as error:
                answering.close()
                raise _refusal(error) from error
        return answering, CompletionForm(chat.model), (chat.stream_options or StreamOptions()) if chat.stream else None

    def _ask(self, chat: ChatRequest, engine: Engine) -> Answering:
        """Let a question in; the rest happens in threads."""
        ticket = self._admission.enter(chat.model)
        return Answering(
            lambda: self._open_stream(chat, engine, ticket),
            stop_strings=chat.stop_strings,
            ticket=ticket,
            metrics=self.metrics,
            readers=self._readers,
            closers=self._closers,
        )

    def _open_stream(self, chat: ChatRequest, engine: Engine, ticket: Ticket) -> AnswerStream:
        description = engine.description
        messages = chat.to_messages()
        if messages[0]["role"] == "system" and not description.takes_system:
            raise UserError("this model has no place for a system message; leave it out")
        messages = self._images.load(messages, ticket.take_pixels)
        options = chat.to_options(self.limits, description.context_length)
        return engine.stream(messages, options, max_seconds=self.limits.max_generation_seconds)


def _refusal(error: BaseException) -> BaseException:
    """What a client is told of an error that its question raised before the model began."""
    if isinstance(error, OverloadedError):
        return overloaded(str(error), seconds=error.retry_after_seconds)
    if isinstance(error, UserError):
        return ApiError(400, str(error), param="messages", code="invalid_value")
    return error


async def _whole_answer(answering: Answering, form: CompletionForm) -> Response:
    text = "".join([piece async for piece in answering.pieces()])
    statistics, reason = await answering.finish()
    return JSONResponse(form.completion(text, statistics, reason))


async def _events(answering: Answering, form: CompletionForm, *, includes_usage: bool) -> AsyncIterator[bytes]:
    """An answer as server-sent events. What goes wrong now can only be told in the stream, which then has no end."""
    no_usage = {"usage": None} if includes_usage else {}  # OpenAI's chunks have the field then, all of them
    yield event(form.chunk({"role": "assistant", "content": ""}) | no_usage)
    try:
        async for piece in answering.pieces():
            yield event(form.chunk({"content": piece}) | no_usage) if piece else KEEP_ALIVE
        statistics, reason = await answering.finish()
    except Exception:
        error_id = secrets.token_hex(6)
        logger.exception("internal error %s", error_id)
        yield event(internal_error(error_id).body)
        return
    yield event(form.chunk({}, reason=reason) | no_usage)
    if includes_usage:
        yield event(form.usage_chunk(statistics))
    yield DONE


class AnswerResponse(StreamingResponse):
    """A stream of events that stops the model when its client leaves."""

    def __init__(self, answering: Answering, events: AsyncIterator[bytes]):
        # nginx would otherwise collect the pieces before it hands them on.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.close()


async def _while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what `work` returns.

    Raises:
        ClientDisconnect: the client left before; `work` is cancelled then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_disconnected(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
