"""What the sections of the page share: models, chats, limits, and the answers that are being written."""

import dataclasses
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gradio as gr

from llava_saep.errors import UserError
from llava_saep.generation import AnswerStatistics, AnswerStream, GenerationOptions, LocalEngine
from llava_saep.generation.attention_maps import AttentionMaps, attention_maps
from llava_saep.generation.messages import Message
from llava_saep.serve.demo.catalog import ModelCatalog
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.feedback import FeedbackFile
from llava_saep.serve.demo.history import History, Visitor, is_token, new_token
from llava_saep.serve.demo.pictures import engine_messages
from llava_saep.serve.demo.protection import UploadRoom
from llava_saep.serve.demo.settings import DemoSettings
from llava_saep.serve.limits import check_conversation
from llava_saep.serve.rate import RequestRate

SECONDS_BETWEEN_UPDATES = 0.08
"""The page is drawn anew this often at most while an answer comes; each time the whole chat is sent."""


Section = Literal["chat", "inside", "compare"]
"""Where on the page an answer is written; each is stopped on its own."""


class ChatParts(NamedTuple):
    """The components of the chat that other sections read.

    Attributes:
        conversation: gr.State with a `Conversation`.
        browser: gr.BrowserState with the visitor's token, for `DemoServices.visitor`.
        model: gr.Dropdown with the name of the chosen model.
    """

    conversation: gr.State
    browser: gr.BrowserState
    model: gr.Dropdown


class PartialAnswer(NamedTuple):
    """An answer as far as it has come; at its end with statistics."""

    text: str
    statistics: AnswerStatistics | None = None


def statistics_fields(statistics: AnswerStatistics | None) -> dict[str, Any] | None:
    """What is kept of an answer's statistics: their fields, and the rate that follows from them."""
    if statistics is None:
        return None
    return {**dataclasses.asdict(statistics), "tokens_per_second": statistics.tokens_per_second}


class DemoServices:
    """One object per page. Thread-safe."""

    def __init__(self, catalog: ModelCatalog, settings: DemoSettings):
        self.catalog = catalog
        self.settings = settings
        self.history = History(
            settings.history_folder or settings.working_folder / "history",
            settings.working_folder / "previews",
            settings.limits,
            max_bytes=settings.max_history_bytes,
        )
        self.feedback = (
            None
            if settings.feedback_file is None
            else FeedbackFile(settings.feedback_file, settings.feedback_image_folder)
        )
        self._rate = RequestRate(settings.limits.max_requests_per_minute)
        self.uploads = UploadRoom(settings.working_folder / "uploads", settings.max_uploads_bytes)
        self._running: dict[tuple[str, Section], list[AnswerStream]] = {}
        self._num_running = 0
        self._lock = threading.Lock()

    def visitor(self, browser: Any, request: gr.Request) -> Visitor:
        """Whose chats these are, by the token in the browser; a new visitor where there is none."""
        token = browser.get("token") if isinstance(browser, dict) else None
        return self.history.visitor(token if is_token(token) else new_token(), request.username)

    def check_rate(self, request: gr.Request) -> None:
        """Count a question.

        Raises:
            UserError: this client has asked too many within a minute.
        """
        # By name where there are names: behind a proxy all of them have one address.
        client = request.username or (request.client.host if request.client else "unknown")
        seconds = self._rate.seconds_to_wait(client)
        if seconds > 0:
            allowed = self.settings.limits.max_requests_per_minute
            raise UserError(f"At most {allowed} questions a minute are answered; ask again in {seconds:.0f} seconds.")

    def answer(
        self,
        model_id: str | None,
        messages: list[Message],
        options: GenerationOptions,
        request: gr.Request,
        section: Section,
    ) -> Iterator[PartialAnswer]:
        """Ask a model, and yield its answer as far as it has come, some times a second and once at the end.

        The model stops when `stop` is called for this section, or the iterator is closed.

        Raises:
            UserError: a limit is exceeded, the model is not loaded, or the engine refuses.
        """
        limits = self.settings.limits
        check_conversation(messages, limits)
        with self._place(), self.catalog.using(model_id) as engine:
            options = _fitting(options, limits.max_new_tokens, engine.description.context_length)
            stream = engine.stream(messages, options, max_seconds=limits.max_generation_seconds)
            with self._stoppable(stream, (request.session_hash or secrets.token_hex(8), section)):
                yield from _paced(stream)

    def look_inside(
        self, model_id: str | None, messages: list[Message], answer: str, request: gr.Request
    ) -> AttentionMaps:
        """Find where an answer looked, when the model has time for it.

        Raises:
            UserError: a limit is exceeded, the model is not loaded or is not of this process, or as `attention_maps`.
        """
        self.check_rate(request)
        check_conversation(messages, self.settings.limits)
        with self._place(), self.catalog.using(model_id) as engine:
            if not isinstance(engine, LocalEngine):
                raise UserError(f"{model_id} runs on another server, which lets nobody look inside.")
            return engine.use_model(lambda predictor: attention_maps(predictor, messages, answer))

    @contextmanager
    def decoded(self, conversation: Conversation, visitor: Visitor) -> Iterator[list[Message]]:
        """The conversation as an engine takes it; its pictures count as held in memory inside the block.

        Raises:
            UserError: the pictures of all questions would be too many, or one has been removed.
        """
        num_pixels = sum(visitor.pictures.num_pixels(name) for name in conversation.pictures)
        with self.history.pixels.held(num_pixels):
            yield engine_messages(conversation, visitor.pictures)

    def add_uploads(self, paths: Sequence[str | Path], visitor: Visitor) -> tuple[str, ...]:
        """Keep the pictures of a question, and return their names; the visitors away longest make room for them.

        Raises:
            UserError: they are too many, or as `PictureStore.add_upload`.
        """
        most = self.settings.limits.max_images_per_message
        if len(paths) > most:
            raise UserError(f"{len(paths)} pictures at once; at most {most} go with a question.")
        names = tuple(visitor.pictures.add_upload(path) for path in paths)
        if names:
            self.history.make_room(visitor)
        return names

    def stop(self, request: gr.Request, section: Section | None = None) -> None:
        """Stop what is being written for a session, in one section or (None) in all."""
        with self._lock:
            streams = [
                stream
                for (session, place), running in self._running.items()
                if session == request.session_hash and section in (None, place)
                for stream in running
            ]
        for stream in streams:
            stream.close()

    def stop_all(self) -> None:
        """Stop all answers."""
        with self._lock:
            streams = [stream for streams in self._running.values() for stream in streams]
        for stream in streams:
            stream.close()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Take one of the places for questions that wait or are answered.

        Raises:
            UserError: all are taken.
        """
        most = self.settings.limits.max_queue + 1
        with self._lock:
            if self._num_running >= most:
                raise UserError(f"{most - 1} questions wait for the model already; ask again in a moment.")
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1

    @contextmanager
    def _stoppable(self, stream: AnswerStream, place: tuple[str, Section]) -> Iterator[None]:
        with self._lock:
            self._running.setdefault(place, []).append(stream)
        try:
            yield
        finally:
            stream.close()
            with self._lock:
                self._running[place].remove(stream)
                if not self._running[place]:
                    del self._running[place]


def _fitting(options: GenerationOptions, most: int, context_length: int | None) -> GenerationOptions:
    """Lower an answer's limit to what the server allows, and to half of a short context, whose rest is the prompt's."""
    if context_length is not None:
        most = min(most, max(context_length // 2, 1))
    return dataclasses.replace(options, max_new_tokens=min(options.max_new_tokens, most))


def _paced(stream: AnswerStream) -> Iterator[PartialAnswer]:
    text, drawn = "", 0.0
    for piece in stream:
        text += piece
        if time.monotonic() - drawn >= SECONDS_BETWEEN_UPDATES:
            drawn = time.monotonic()
            yield PartialAnswer(text)
    stream.close()
    yield PartialAnswer(text.strip(), stream.statistics)
