"""The chat: questions with pictures, answers that stream, and everything that one does with them afterwards.

The conversation lives on the server (a gr.State, and a file per chat); what the browser sends back of the chat is never
read, so that nobody can put words or files into it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from llava_saep.errors import UserError
from llava_saep.serve.demo.asking import Controls, ControlValues, question_field
from llava_saep.serve.demo.conversation import Conversation, whole_characters
from llava_saep.serve.demo.events import QUIET, TELLING, answering
from llava_saep.serve.demo.examples import write_examples
from llava_saep.serve.demo.history import QUESTION_SECONDS, Visitor, is_token, new_token
from llava_saep.serve.demo.question_editor import QuestionEditor
from llava_saep.serve.demo.rows import ChatRows, chat_rows
from llava_saep.serve.demo.seen_panel import SeenPanel
from llava_saep.serve.demo.services import ChatParts, DemoServices, statistics_fields
from llava_saep.serve.demo.text import as_html, told
from llava_saep.serve.demo.turns import Turn, Turns

_PLACEHOLDER = "Ask about a picture: drop, paste or attach one, or several."
_THANKS = "Whoever runs this page will find it, with the chat up to this answer."


class ChatsList(NamedTuple):
    """The saved chats beside the page."""

    new: gr.Button
    chats: gr.Radio
    delete: gr.Button


@dataclass(frozen=True)
class _Question:
    """A question on its way to an answer.

    Args:
        asked: the conversation that ends with it.
        before: what is shown again when it is refused, with `typed` in the field.
        typed: None: it is none that the field held.
    """

    asked: Conversation
    before: Conversation
    visitor: Visitor
    browser: dict[str, Any]
    model_id: str | None
    controls: ControlValues
    request: gr.Request
    typed: dict[str, Any] | None = None


class ChatSection:
    """Builds the chat inside a gr.Blocks and connects it.

    Args:
        model: the dropdown with the chosen model.
    """

    def __init__(
        self,
        services: DemoServices,
        *,
        browser: gr.BrowserState,
        model: gr.Dropdown,
        controls: Controls,
        chats: ChatsList,
    ):
        self.services = services
        self.browser = browser
        self.model = model
        self.controls = controls
        self.chats = chats
        self.conversation = gr.State(Conversation(chat_id=""))  # until `restore`; Gradio would call a function late
        self.editor = QuestionEditor(max_characters=services.settings.limits.max_prompt_characters)
        self.seen = SeenPanel(services)
        self.turns = Turns()
        self._build()
        self._connect()

    @property
    def parts(self) -> ChatParts:
        """What other sections read."""
        return ChatParts(self.conversation, self.browser, self.model)

    @property
    def _outputs(self) -> list[Any]:
        """What each event fills that shows a chat; see `_shown`."""
        return [self.conversation, self.chatbot, self.question, self.stop, self.chats.chats, self.browser]

    def _build(self) -> None:
        self.chatbot = gr.Chatbot(
            show_label=False,
            elem_id="chat",
            height="62dvh",
            min_height=320,
            # Text as it stands: neither Markdown nor HTML nor formulas nor tags, and no files to download.
            render_markdown=False,
            sanitize_html=True,
            latex_delimiters=[],
            allow_tags=False,
            allow_file_downloads=False,
            buttons=["copy"],
            feedback_options=("Like", "Dislike"),
            placeholder=_EMPTY_CHAT,
            examples=_examples(self.services),
        )
        self.question = question_field(
            self.services.settings.limits,
            max_lines=8,
            show_label=False,
            placeholder=_PLACEHOLDER,
            elem_id="question",
            autofocus=True,
        )
        with gr.Row(elem_id="chat-actions"):
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop", size="sm")
            self.editor.build_opener()
            self.webcam_opener = gr.Checkbox(label="Camera", value=False, container=False, elem_id="webcam-opener")
            self.seen.build_opener()
        self.editor.build_panel(self.conversation)
        self.webcam = gr.Image(
            label="Take a picture; it goes with your next question",
            sources=["webcam"],
            type="filepath",
            format="png",
            visible=False,
            height=320,
            elem_id="webcam",
        )
        self.seen.build_panel()

    def _connect(self) -> None:
        asking = [self.conversation, self.browser, self.model, *self.controls]
        shown = self._outputs
        writing = {"outputs": shown, **answering(self.services.settings.limits)}
        answers = [
            self.question.submit(self.ask, [self.question, *asking], **writing),
            self.chatbot.retry(self.retry, asking, **writing),
            self.editor.submit.click(self.edit, [self.editor.place, self.editor.text, *asking], **writing),
        ]
        self.stop.click(self.stop_answer, None, None, **QUIET)
        self.chatbot.undo(self.undo, asking[:2], shown, **TELLING)
        self.chatbot.clear(self.start_anew, asking[:2], shown, **QUIET)
        self.chats.new.click(self.start_anew, asking[:2], shown, **QUIET)
        opened = self.chats.chats.input(self.open_chat, [self.chats.chats, *asking[:2]], shown, **TELLING)
        self.chats.delete.click(self.delete_chat, asking[:2], shown, **QUIET)
        self.chatbot.example_select(self.take_example, None, [self.question], **QUIET)
        if self.services.feedback is not None:
            self.chatbot.like(self.note_opinion, asking[:2], [self.conversation], **TELLING)
        self.webcam_opener.change(lambda is_open: gr.update(visible=is_open), self.webcam_opener, self.webcam, **QUIET)
        self.webcam.input(self.add_photo, [self.question, self.webcam], [self.question, self.webcam], **QUIET)
        self.seen.connect(self.parts, *(answer.then for answer in answers), opened.then, self.model.input)

    def restore_on(self, page: gr.Blocks) -> None:
        """Bring the visitor's chats back when the page is loaded, and stop the model when it is left."""
        page.load(self.restore, [self.browser], self._outputs, **QUIET)
        page.unload(self.leave_page)

    # What the events do

    def ask(
        self,
        question: dict[str, Any] | None,
        conversation: Conversation,
        browser: Any,
        model_id: str | None,
        request: gr.Request,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        """Put a question with its pictures, and stream the answer."""
        question = question or {}
        browser, visitor = self._visitor(browser, request)
        conversation = conversation if conversation.chat_id else Conversation.new()
        typed = {"text": whole_characters(question.get("text") or ""), "files": question.get("files") or []}
        try:
            self.services.check_rate(request)
            asked = self._with_question(typed, conversation, visitor)
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not asked")
            yield self._shown(conversation, visitor, browser, question=gr.skip())
            return
        values = ControlValues(*controls)
        yield from self._answered(_Question(asked, conversation, visitor, browser, model_id, values, request, typed))

    def retry(
        self,
        conversation: Conversation,
        browser: Any,
        model_id: str | None,
        request: gr.Request,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        """Ask the last question once more."""
        browser, visitor = self._visitor(browser, request)
        before, question = conversation.before_last_question()
        if question is None:
            yield self._shown(conversation, visitor, browser)
            return
        asked = before.with_question(question.text, question.pictures)
        values = ControlValues(*controls)
        yield from self._answered(_Question(asked, conversation, visitor, browser, model_id, values, request))

    def edit(
        self,
        place: int | None,
        text: str | None,
        conversation: Conversation,
        browser: Any,
        model_id: str | None,
        request: gr.Request,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        """Put other words into an earlier question, and go on from there."""
        browser, visitor = self._visitor(browser, request)
        try:
            asked = conversation.with_edited_question(-1 if place is None else int(place), text or "")
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not changed")
            yield self._shown(conversation, visitor, browser)
            return
        values = ControlValues(*controls)
        yield from self._answered(_Question(asked, conversation, visitor, browser, model_id, values, request))

    def undo(self, conversation: Conversation, browser: Any, request: gr.Request) -> list[Any]:
        """Take the last question and its answer back, also one that is being written; the words return to the field."""
        turn = self._leave(request, is_kept=False)
        if turn is not None and turn.conversation is not None:
            conversation = turn.conversation
        browser, visitor = self._visitor(browser, request)
        before, question = conversation.before_last_question()
        if question is None:
            return self._shown(conversation, visitor, browser)
        try:
            files = [str(visitor.pictures.as_upload(name)) for name in question.pictures]
        except UserError as error:
            gr.Warning(as_html(told(error)))
            files = []
        if before.messages:
            visitor.save(before)
        else:  # its pictures are on their way to the field
            visitor.delete(before.chat_id, min_age_seconds=QUESTION_SECONDS)
        return self._shown(before, visitor, browser, question={"text": question.text, "files": files})

    def start_anew(self, conversation: Conversation, browser: Any, request: gr.Request) -> list[Any]:
        """Begin another chat; the old one stays in the list."""
        self._leave(request)
        browser, visitor = self._visitor(browser, request)
        return self._shown(Conversation.new(), visitor, browser, question={"text": "", "files": []})

    def open_chat(
        self, chat_id: str | None, conversation: Conversation, browser: Any, request: gr.Request
    ) -> list[Any]:
        """Go on with a saved chat."""
        self._leave(request)
        browser, visitor = self._visitor(browser, request)
        opened = visitor.conversation(chat_id or "")
        if opened is None:
            gr.Warning("This chat has been removed from the server.")
        return self._shown(opened or conversation, visitor, browser)

    def delete_chat(self, conversation: Conversation, browser: Any, request: gr.Request) -> list[Any]:
        """Forget the chat that is shown, with its pictures."""
        self._leave(request, is_kept=False)
        browser, visitor = self._visitor(browser, request)
        visitor.delete(conversation.chat_id)
        return self._shown(Conversation.new(), visitor, browser, question={"text": "", "files": []})

    def restore(self, browser: Any, request: gr.Request) -> list[Any]:
        """Show the chat that was open, after the page was loaded."""
        browser, visitor = self._visitor(browser, request)
        opened = visitor.conversation(browser.get("chat") or "")
        return self._shown(opened or Conversation.new(), visitor, browser)

    def note_opinion(
        self, conversation: Conversation, browser: Any, opinion: gr.LikeData, request: gr.Request
    ) -> Conversation:
        """Write a like or dislike, or that it was taken back, to the feedback file."""
        _, visitor = self._visitor(browser, request)
        liked = {"Like": True, "Dislike": False, True: True, False: False}.get(opinion.liked)
        try:
            self.services.check_rate(request)
            place = self._place_of(opinion.index, conversation, visitor)
            judged = conversation.with_opinion(place, liked)
            self.services.feedback.append(judged, place, liked, visitor.pictures)
            if liked is not None:
                gr.Info(_THANKS, title="Noted", duration=5)
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not noted")
            return conversation
        visitor.save(judged)
        return judged

    def take_example(self, chosen: gr.SelectData) -> dict[str, Any]:
        """Put an example's question and pictures into the field."""
        text = chosen.value.get("text") if isinstance(chosen.value, dict) else None
        for example, paths in write_examples(self.services.settings.working_folder / "examples"):
            if example.question == text:
                return {"text": example.question, "files": [str(path) for path in paths]}
        return {"text": "", "files": []}

    def add_photo(self, question: dict[str, Any] | None, photo: str | None) -> list[Any]:
        """Let a picture of the camera go with the next question."""
        if photo is None:
            return [gr.skip(), gr.skip()]
        question = question or {}
        return [{"text": question.get("text") or "", "files": [*(question.get("files") or []), photo]}, None]

    def stop_answer(self, request: gr.Request) -> None:
        """Stop the answer that is being written in this page's chat."""
        self.services.stop(request, "chat")

    def leave_page(self, request: gr.Request) -> None:
        """Stop all that is being written for a page that is closed."""
        self.services.stop(request)

    # Steps

    def _answered(self, question: _Question) -> Iterator[list[Any]]:
        """Stream the answer to a question, and keep what came of it, even if the visitor leaves meanwhile."""
        try:
            with self.turns.taken(question.request.session_hash or "") as turn:
                for outputs in self._turn(turn, question):
                    yield [gr.skip()] * len(outputs) if turn.is_left else outputs
        except UserError as error:  # another answer is being written
            gr.Warning(as_html(told(error)), title="Not asked")
            yield [gr.skip()] * len(self._outputs)

    def _turn(self, turn: Turn, question: _Question) -> Iterator[list[Any]]:
        """The steps of `_answered`."""
        asked, visitor, browser, typed = question.asked, question.visitor, question.browser, question.typed
        model_id, request = question.model_id, question.request
        text, statistics = "", None
        try:
            if typed is None:  # a new question has been counted before its pictures were taken
                self.services.check_rate(request)
            options = question.controls.options
            asked = dataclasses.replace(asked, system=self._system(question.controls, model_id))
            yield self._writing(asked, visitor, text, clears_field=typed is not None)
            with self.services.decoded(asked, visitor) as messages:
                for partial in self.services.answer(model_id, messages, options, request, "chat"):
                    text, statistics = partial
                    yield self._writing(asked, visitor, text)
        except GeneratorExit:
            self._keep(turn, asked, visitor, text, model_id, None)
            raise
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)), title="Not answered", duration=15)
            turn.conversation = question.before
            kept = self._keep(turn, asked, visitor, text, model_id, None) if text else question.before
            yield self._shown(kept, visitor, browser, question=typed if typed and not text else gr.skip())
            return
        yield self._shown(self._keep(turn, asked, visitor, text, model_id, statistics), visitor, browser)

    def _keep(
        self, turn: Turn, asked: Conversation, visitor: Visitor, text: str, model_id: str | None, statistics: Any
    ) -> Conversation:
        turn.conversation = answered = asked.with_answer(text, model_id or "", statistics_fields(statistics))
        if turn.is_kept:
            visitor.save(answered)
            self.services.history.make_room(visitor)
        return answered

    def _leave(self, request: gr.Request, *, is_kept: bool = True) -> Turn | None:
        """Stop what is being written, since something else will be shown; it is saved first where it is kept."""
        turn = self.turns.leave(request.session_hash or "", is_kept=is_kept)
        self.services.stop(request, "chat")
        self.turns.wait_for(turn)
        return turn

    def _with_question(self, typed: dict[str, Any], conversation: Conversation, visitor: Visitor) -> Conversation:
        return conversation.with_question(typed["text"], self.services.add_uploads(typed["files"], visitor))

    def _system(self, controls: ControlValues, model_id: str | None) -> str:
        """The system prompt, where the chosen model's template has a place for one."""
        return controls.system_prompt if self.services.catalog.engine(model_id).description.takes_system else ""

    def _place_of(self, index: int | list[int] | tuple[int, ...], conversation: Conversation, visitor: Visitor) -> int:
        """The place in the conversation of a row of the chatbot, which the browser names."""
        row = index[0] if isinstance(index, (list, tuple)) else index
        places = chat_rows(conversation, visitor.pictures).places
        if not isinstance(row, int) or not 0 <= row < len(places):
            raise UserError("This message is no longer there; reload the page.")
        return places[row]

    def _visitor(self, browser: Any, request: gr.Request) -> tuple[dict[str, Any], Visitor]:
        """What the browser keeps, with a token, and whose chats that are."""
        has_token = isinstance(browser, dict) and is_token(browser.get("token"))
        kept = browser if has_token else {"token": new_token(), "chat": None}
        return kept, self.services.visitor(kept, request)

    def _writing(self, asked: Conversation, visitor: Visitor, text: str, clears_field: bool = False) -> list[Any]:
        """Outputs while an answer comes."""
        field = gr.update(value={"text": "", "files": []}) if clears_field else gr.skip()
        rows = chat_rows(asked, visitor.pictures, unfinished=text)
        return [gr.skip(), _chatbot(rows), field, gr.update(visible=True), gr.skip(), gr.skip()]

    def _shown(
        self, conversation: Conversation, visitor: Visitor, browser: dict[str, Any], question: Any = None
    ) -> list[Any]:
        """Outputs when nothing is being written."""
        saved = visitor.conversations()
        choices = [(chat.title, chat.chat_id) for chat in saved]
        shown = conversation.chat_id if any(chat.chat_id == conversation.chat_id for chat in saved) else None
        field = gr.skip() if question is None else question
        return [
            conversation,
            _chatbot(chat_rows(conversation, visitor.pictures)),
            field,
            gr.update(visible=False),
            gr.update(choices=choices, value=shown, visible=bool(choices)),
            {**browser, "chat": conversation.chat_id},
        ]


def _chatbot(rows: ChatRows) -> dict[str, Any]:
    return gr.update(value=rows.rows, feedback_value=rows.opinions)


_EMPTY_CHAT = "Ask a question about a picture, or try one of these."


def _examples(services: DemoServices) -> list[dict[str, Any]]:
    return [
        {"text": example.question, "display_text": example.name, "files": [str(path) for path in paths]}
        for example, paths in write_examples(services.settings.working_folder / "examples")
    ]
