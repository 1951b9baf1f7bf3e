"""Compare: two models side by side, asked the same about the same picture, writing at the same time."""

import base64
import io
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import AnswerStatistics, GenerationOptions
from llava_saep.generation.messages import Message
from llava_saep.serve.demo.asking import Controls, ControlValues, question_field
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.events import QUIET, answering
from llava_saep.serve.demo.history import Visitor
from llava_saep.serve.demo.services import ChatParts, DemoServices
from llava_saep.serve.demo.text import as_html, told

_SIDES = ("left", "right")
_NUM_OUTPUTS = 7
_THUMBNAIL_SIDE = 192
_HINT = "Choose two models, add a picture, and ask both at once."


@dataclass
class _Side:
    """What one column shows."""

    model_id: str
    text: str = ""
    state: str = "waiting"
    statistics: AnswerStatistics | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Asked:
    """One question to both."""

    messages: list[Message]
    options: GenerationOptions
    request: gr.Request
    cancelled: threading.Event = field(default_factory=threading.Event)


class CompareSection:
    """Builds the section inside a gr.Blocks and connects it.

    Args:
        controls: how answers are decoded; both models get the same.
    """

    def __init__(self, services: DemoServices, *, tab: gr.Tab, chat: ChatParts, controls: Controls):
        self.services = services
        self.chat = chat
        self.question = question_field(
            services.settings.limits, show_label=False, placeholder=_HINT, elem_id="compare-question"
        )
        with gr.Row(elem_id="compare-actions"):
            self.again = gr.Button("Ask the chat's last question", size="sm", elem_id="compare-chat")
            self.stop = gr.Button("Stop both", variant="stop", size="sm", visible=False, elem_id="compare-stop")
        self.asked = gr.HTML("", elem_id="compare-asked")
        with gr.Row(elem_id="compare"):
            self.models, self.cards = zip(*(self._build_side(side) for side in _SIDES), strict=True)
        self._connect(tab, controls)

    def _build_side(self, side: str) -> tuple[gr.Dropdown, gr.HTML]:
        with gr.Column(min_width=280):
            model = gr.Dropdown(
                self.services.catalog.choices,
                value=self._default(side),
                label="First model" if side == "left" else "Second model",
                filterable=False,
                interactive=True,
                elem_id=f"compare-model-{side}",
            )
            card = gr.HTML("", elem_id=f"compare-{side}")
        return model, card

    def _connect(self, tab: gr.Tab, controls: Controls) -> None:
        shown = [self.question, self.asked, self.stop, *self.cards, *self.models]
        asking = [*self.models, self.chat.browser, *controls]
        writing = answering(self.services.settings.limits)
        self.question.submit(self.ask, [self.question, *asking], shown, **writing)
        self.again.click(self.ask_as_in_chat, [self.chat.conversation, *asking], shown, **writing)
        self.stop.click(self.stop_both, None, None, **QUIET)
        tab.select(self.refresh, [*self.models], [*self.models], **QUIET)

    # What the events do

    def refresh(self, *models: str | None) -> list[Any]:
        """Show what is loaded now."""
        return [
            gr.update(choices=self.services.catalog.choices, value=model_id or self._default(side))
            for side, model_id in zip(_SIDES, models, strict=True)
        ]

    def ask(
        self,
        question: Mapping[str, Any],
        left: str | None,
        right: str | None,
        browser: Any,
        request: gr.Request,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        """Put a question to both models, and stream both answers."""
        values = ControlValues(*controls)
        try:
            options = self._checked((left, right), values, request)
            names = self.services.add_uploads(question.get("files") or [], self.services.visitor(browser, request))
            conversation = Conversation.new().with_question(question.get("text") or "", names)
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not asked")
            yield [gr.skip()] * _NUM_OUTPUTS
            return
        yield from self._answered(conversation, (left, right), browser, values.system_prompt, options, request)

    def ask_as_in_chat(
        self,
        conversation: Conversation,
        left: str | None,
        right: str | None,
        browser: Any,
        request: gr.Request,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        """Put the chat's last question to both models, with all that was said before it."""
        values = ControlValues(*controls)
        before, question = conversation.before_last_question()
        try:
            if question is None:
                raise UserError("The chat has no question yet.")
            options = self._checked((left, right), values, request)
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not asked")
            yield [gr.skip()] * _NUM_OUTPUTS
            return
        asked = before.with_question(question.text, question.pictures)
        yield from self._answered(asked, (left, right), browser, values.system_prompt, options, request)

    def stop_both(self, request: gr.Request) -> None:
        """Stop what both are writing."""
        self.services.stop(request, "compare")

    # Steps

    def _answered(
        self,
        conversation: Conversation,
        models: tuple[str | None, str | None],
        browser: Any,
        system: str,
        options: GenerationOptions,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Stream both answers; an error of one model is shown in its column, and the other goes on."""
        sides = [_Side(model_id or "") for model_id in models]
        asked = None
        try:
            visitor = self.services.visitor(browser, request)
            with self.services.decoded(conversation, visitor) as messages:
                asked = _Asked(messages, options, request)
                yield self._begun(conversation, visitor, sides)
                for _ in self._load(sides):
                    yield self._going_on(sides)
                for _ in self._both(sides, asked, system):
                    yield self._going_on(sides)
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not asked", duration=15)
            if asked is None:
                yield [gr.skip()] * _NUM_OUTPUTS
                return
        finally:
            if asked is not None:
                asked.cancelled.set()
        models_shown = [gr.update(choices=self.services.catalog.choices) for _ in _SIDES]
        yield [gr.skip(), gr.skip(), gr.update(visible=False), *map(self._card, sides), *models_shown]

    def _checked(self, models: Sequence[str | None], controls: ControlValues, request: gr.Request) -> GenerationOptions:
        """Return how both shall answer.

        Raises:
            UserError: there are not two models, or this client asks too often.
        """
        if None in models:
            raise UserError("Choose two models to compare; --models-dir offers all of a folder.")
        for _ in models:
            self.services.check_rate(request)
        return controls.options

    def _load(self, sides: Sequence[_Side]) -> Iterator[None]:
        """Load what is not loaded yet, one after the other, since memory is looked at before each."""
        for side in sides:
            try:
                for progress in self.services.catalog.load(side.model_id):
                    side.state = f"loading, {progress.seconds:.0f} s"
                    yield
            except Exception as error:  # every kind becomes a message
                side.error = told(error)

    def _both(self, sides: Sequence[_Side], asked: _Asked, system: str) -> Iterator[None]:
        """Let both write, each in a thread, and go on whenever there is something new."""
        news: queue.SimpleQueue[bool] = queue.SimpleQueue()
        writers = [
            threading.Thread(target=self._write, args=(side, asked, system, news), daemon=True)
            for side in sides
            if side.error is None
        ]
        for writer in writers:
            writer.start()
        num_writing = len(writers)
        while num_writing:
            num_writing -= news.get()
            yield

    def _write(self, side: _Side, asked: _Asked, system: str, news: queue.SimpleQueue) -> None:
        """Let one model answer; runs in a thread of its own, and says in `news` whether it has ended."""
        try:
            messages = self._with_system(asked.messages, side.model_id, system)
            options, request = asked.options, asked.request
            for partial in self.services.answer(side.model_id, messages, options, request, "compare"):
                side.text, side.statistics, side.state = partial.text, partial.statistics, "writing"
                news.put(False)
                if asked.cancelled.is_set():  # the visitor has left
                    break
        except Exception as error:  # every kind becomes a message
            side.error = told(error)
        side.state = "done"
        news.put(True)

    def _with_system(self, messages: list[Message], model_id: str, system: str) -> list[Message]:
        """The conversation with a system prompt, where the model's template has a place for one."""
        if not system or not self.services.catalog.engine(model_id).description.takes_system:
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _begun(self, conversation: Conversation, visitor: Visitor, sides: Sequence[_Side]) -> list[Any]:
        """Outputs when a question has been taken."""
        thumbnails = "".join(_thumbnail(visitor.pictures.preview(name)) for name in conversation.pictures)
        text = f"<div class='written'>{as_html(conversation.messages[-1].text)}</div>"
        return [
            {"text": "", "files": []},
            f"<div class='asked'>{thumbnails}{text}</div>",
            gr.update(visible=True),
            *map(self._card, sides),
            *[gr.skip()] * 2,
        ]

    def _going_on(self, sides: Sequence[_Side]) -> list[Any]:
        return [*[gr.skip()] * 3, *map(self._card, sides), *[gr.skip()] * 2]

    def _card(self, side: _Side) -> str:
        """One column, as HTML of our own."""
        entry = self.services.catalog.entry(side.model_id)
        facts = [] if entry is None else [f"{entry.projector} projector", f"{entry.tokens_per_image} tokens per image"]
        parts = [f"<ul class='facts'>{''.join(f'<li>{as_html(fact)}</li>' for fact in facts)}</ul>"]
        if side.text or side.error is None:
            waiting = "" if side.text else " waiting"
            parts.append(f"<div class='written{waiting}'>{as_html(side.text or f'{side.state} …')}</div>")
        if side.error is not None:
            parts.append(f"<div class='refused' role='alert'>{as_html(side.error)}</div>")
        if side.statistics is not None:
            parts.append(_table(side.statistics))
        return "".join(parts)

    def _default(self, side: str) -> str | None:
        """The first model on the left, the second on the right, those before others that are loaded."""
        names = self.services.catalog.ids_loaded_first
        place = _SIDES.index(side)
        return names[place] if place < len(names) else None


def _thumbnail(preview: Path) -> str:
    """A small picture inside HTML."""
    file = io.BytesIO()
    with Image.open(preview) as picture:
        picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        picture.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='picture of the question' src='data:image/png;base64,{data}'>"


_REASONS = {
    "stop": "complete",
    "length": "cut off at the length that was asked for",
    "cancelled": "stopped",
    "time_limit": "cut off at the time limit",
}


def _table(statistics: AnswerStatistics) -> str:
    """An answer's numbers, as HTML of our own."""
    speed = statistics.tokens_per_second if statistics.completion_tokens > 1 else 0.0
    rows = {
        "Image tokens": f"{statistics.image_tokens:,}",
        "Prompt tokens": f"{statistics.prompt_tokens:,}",
        "Answer tokens": f"{statistics.completion_tokens:,}",
        "First token": f"{statistics.first_token_seconds:.2f} s",
        "Speed": f"{speed:.1f} tokens/s" if speed else "–",
        "In all": f"{statistics.seconds:.2f} s",
        "End": _REASONS[statistics.finish_reason],
    }
    cells = "".join(f"<tr><th scope='row'>{name}</th><td>{as_html(value)}</td></tr>" for name, value in rows.items())
    return f"<table class='numbers'>{cells}</table>"
