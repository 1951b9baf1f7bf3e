"""Look inside: the projector's tokens over a picture, and where each word of an answer looked among them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions
from llava_saep.generation.messages import Message
from llava_saep.model.token_layout import TILES, WHOLE
from llava_saep.serve.demo.asking import question_field
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.events import TELLING, answering
from llava_saep.serve.demo.history import Visitor
from llava_saep.serve.demo.look import HINT, Look, LookStore, View, drawn, facts_of, layer_choices, note, visible
from llava_saep.serve.demo.services import ChatParts, DemoServices, statistics_fields
from llava_saep.serve.demo.text import as_html, told

_LABEL_CHARACTERS = 70


class InsideSection:
    """Builds the section inside a gr.Blocks and connects it.

    Args:
        tab: the tab that it stands in; when it is chosen, the chat's last answer is looked into.
        chat: whose answers can be looked into.
    """

    def __init__(self, services: DemoServices, *, tab: gr.Tab, chat: ChatParts):
        self.services = services
        self.chat = chat
        self.looks = LookStore()
        self.look_name = gr.State(None, time_to_live=3600, delete_callback=self.looks.discard)
        self.looked_into = gr.State(None)
        with gr.Row(elem_id="inside"):
            with gr.Column(min_width=300, scale=5):
                self._build_question()
            with gr.Column(min_width=300, scale=6):
                self._build_picture()
        self._connect(tab)

    def _build_question(self) -> None:
        self.answer = gr.Dropdown(
            [], label="Answer of this chat", elem_id="inside-answer", filterable=False, interactive=True
        )
        self.question = question_field(
            self.services.settings.limits,
            file_count="single",
            label="Or ask about a picture here",
            placeholder="Drop, paste or attach a picture, and ask about it.",
            elem_id="inside-question",
        )
        self.written = gr.HTML(note(HINT), elem_id="inside-written")
        self.tokens = gr.Radio([], label="Answer", visible=False, elem_id="inside-tokens")
        self.facts = gr.HTML("", elem_id="inside-facts")

    def _build_picture(self) -> None:
        self.picture = gr.Image(
            show_label=False,
            interactive=False,
            type="pil",
            format="png",
            buttons=["download", "fullscreen"],
            elem_id="inside-picture",
        )
        self.caption = gr.HTML("", elem_id="inside-caption")
        with gr.Row(elem_id="inside-view"):
            self.layers = gr.Dropdown(
                [("All layers", "all")],
                value="all",
                label="Layers",
                filterable=False,
                min_width=140,
                elem_id="inside-layers",
            )
            self.which_picture = gr.Radio([], label="Picture", visible=False, min_width=140, elem_id="inside-which")
            self.part = gr.Radio(
                [("Whole", WHOLE), ("Tiles", TILES)],
                value=WHOLE,
                label="Crops",
                visible=False,
                min_width=140,
                elem_id="inside-part",
            )
        with gr.Row():
            self.with_grid = gr.Checkbox(True, label="Token grid", container=False, min_width=120)
            self.only_above = gr.Checkbox(
                False,
                label="Only what exceeds the answer's average",
                container=False,
                min_width=240,
                elem_id="inside-above",
            )

    def _connect(self, tab: gr.Tab) -> None:
        asked = [self.chat.conversation, self.chat.browser]
        view = [
            self.look_name,
            self.tokens,
            self.which_picture,
            self.part,
            self.layers,
            self.with_grid,
            self.only_above,
        ]
        shown = [
            self.look_name,
            self.looked_into,
            self.answer,
            self.written,
            self.tokens,
            self.facts,
            self.picture,
            self.caption,
            self.layers,
            self.which_picture,
            self.part,
        ]
        working = {
            **answering(self.services.settings.limits),
            "show_progress": "minimal",
            "show_progress_on": [self.picture],
        }
        tab.select(self.open, [self.looked_into, *asked], shown, **working)
        self.answer.input(self.choose_answer, [self.answer, *asked], shown, **working)
        self.question.submit(
            self.ask, [self.question, self.chat.browser, self.chat.model], [self.question, *shown], **working
        )
        gr.on(
            [component.input for component in view[1:]],
            self.redraw,
            view,
            [self.picture, self.caption],
            trigger_mode="always_last",
            **TELLING,
        )

    # What the events do

    def open(self, looked_into: Any, conversation: Conversation, browser: Any, request: gr.Request) -> list[Any]:
        """Look into the chat's last answer, unless that is what is shown."""
        choices = _answers(conversation)
        if not choices:
            return [*[gr.skip()] * 2, gr.update(choices=[], value=None), *[gr.skip()] * 8]
        place = choices[-1][1]
        if looked_into == _identity(conversation, place):
            return [*[gr.skip()] * 2, gr.update(choices=choices), *[gr.skip()] * 8]
        return self.choose_answer(place, conversation, browser, request)

    def choose_answer(
        self, place: int | None, conversation: Conversation, browser: Any, request: gr.Request
    ) -> list[Any]:
        """Look into one of the chat's answers."""
        choices = _answers(conversation)
        try:
            if place not in [value for _, value in choices]:
                raise UserError("This answer is no longer there; choose another.")
            answer = conversation.messages[place]
            asked = dataclasses.replace(conversation, messages=conversation.messages[:place])
            with self.services.decoded(asked, self.services.visitor(browser, request)) as messages:
                name = self._looked(answer.model_id, messages, answer.text, answer.statistics, request)
        except Exception as error:  # every kind becomes a message
            return self._refused(error, choices, place)
        return self._shown(name, _identity(conversation, place), gr.update(choices=choices, value=place))

    def ask(
        self, question: Mapping[str, Any], browser: Any, model_id: str | None, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Answer a question that is asked here, and look into the answer."""
        text, statistics = "", None
        try:
            self.services.check_rate(request)
            conversation, visitor = self._asked(question, browser, request)
            options = GenerationOptions(max_new_tokens=self.services.settings.options.max_new_tokens)
            with self.services.decoded(conversation, visitor) as messages:
                for partial in self.services.answer(model_id, messages, options, request, "inside"):
                    text, statistics = partial
                    yield [gr.skip(), *self._writing(text)]
                name = self._looked(model_id, messages, text, statistics_fields(statistics), request)
        except Exception as error:  # every kind becomes a message
            yield [gr.skip(), *self._refused(error, None, None)]
            return
        yield [{"text": "", "files": []}, *self._shown(name, None, gr.update(value=None))]

    def redraw(
        self,
        name: str | None,
        piece: int | None,
        picture: int | None,
        part: str,
        layers: str,
        with_grid: bool,
        only_above: bool,
    ) -> list[Any]:
        """Draw what was chosen."""
        try:
            view = View(piece, picture or 0, part or WHOLE, layers or "all", bool(with_grid), bool(only_above))
            self.services.uploads.check_room()
            return list(drawn(self.looks.get(name), view))
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)))
            return [gr.skip(), gr.skip()]

    # Steps

    def _asked(self, question: Mapping[str, Any], browser: Any, request: gr.Request) -> tuple[Conversation, Visitor]:
        files = question.get("files") or []
        if not files:
            raise UserError("Add a picture: without one there is nothing to look at.")
        visitor = self.services.visitor(browser, request)
        names = self.services.add_uploads(files, visitor)
        return Conversation.new().with_question(question.get("text") or "", names), visitor

    def _looked(
        self,
        model_id: str | None,
        messages: list[Message],
        answer: str,
        statistics: Mapping[str, Any] | None,
        request: gr.Request,
    ) -> str:
        """Look into an answer, and return the name under which that is kept."""
        maps = self.services.look_inside(model_id, messages, answer, request)
        projector = self.services.catalog.engine(model_id).description.projector
        return self.looks.put(Look.of(maps, model_id or "", projector, statistics))

    def _writing(self, text: str) -> list[Any]:
        """Outputs while an answer is written."""
        hidden = gr.update(visible=False, value=None)
        return [None, None, gr.skip(), gr.update(value=_plain(text or "…"), visible=True), hidden, "", *[gr.skip()] * 5]

    def _refused(self, error: Exception, choices: list[tuple[str, int]] | None, place: int | None) -> list[Any]:
        """Outputs where there is nothing to look into."""
        answers = gr.skip() if choices is None else gr.update(choices=choices, value=place)
        hidden = gr.update(visible=False, value=None)
        return [
            None,
            None,
            answers,
            gr.update(value=_refusal(error), visible=True),
            hidden,
            "",
            None,
            "",
            *[gr.skip()] * 3,
        ]

    def _shown(self, name: str, identity: Any, answers: Any) -> list[Any]:
        """Outputs of an answer that was looked into."""
        look = self.looks.get(name)
        words = [(visible(piece.text), index) for index, piece in enumerate(look.maps.pieces)]
        parts = {token_map.part for image in look.maps.images for token_map in image.layout.maps}
        pictures = [(str(index + 1), index) for index in range(len(look.maps.images))]
        last = len(pictures) - 1
        drawing, caption = drawn(look, View(picture=last))
        return [
            name,
            identity,
            answers,
            gr.update(value="", visible=False),
            gr.update(choices=words, value=None, visible=True),
            facts_of(look),
            drawing,
            caption,
            gr.update(choices=layer_choices(look.maps.num_layers), value="all"),
            gr.update(choices=pictures, value=last, visible=last > 0),
            gr.update(value=WHOLE, visible=TILES in parts),
        ]


def _answers(conversation: Conversation) -> list[tuple[str, int]]:
    """Answers of a chat that has pictures, with their places in it."""
    answers = []
    for place, message in enumerate(conversation.messages):
        if message.role == "assistant" and message.text:
            words = " ".join(message.text.split())
            label = words if len(words) <= _LABEL_CHARACTERS else words[: _LABEL_CHARACTERS - 1] + "…"
            answers.append((f"{len(answers) + 1}. {label}", place))
    return answers


def _identity(conversation: Conversation, place: int) -> tuple[str, int, str]:
    return (conversation.chat_id, place, conversation.messages[place].text)


def _refusal(error: Exception) -> str:
    return f"<div class='refused' role='alert'>{as_html(told(error))}</div>"


def _plain(text: str) -> str:
    return f"<div class='written'>{as_html(text)}</div>"
