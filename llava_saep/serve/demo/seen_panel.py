"""What the model sees of a chat's last pictures, shown if asked."""

from typing import Any

import gradio as gr

from llava_saep.errors import UserError
from llava_saep.generation import LocalEngine
from llava_saep.serve.demo.conversation import Conversation
from llava_saep.serve.demo.events import TELLING
from llava_saep.serve.demo.model_view import what_the_model_sees
from llava_saep.serve.demo.services import ChatParts, DemoServices
from llava_saep.serve.demo.text import as_html, told


class SeenPanel:
    """A switch and the gallery that it opens."""

    def __init__(self, services: DemoServices):
        self.services = services

    def build_opener(self) -> None:
        """Make the switch."""
        self.opener = gr.Checkbox(
            label="What the model sees",
            value=False,
            container=False,
            visible=self.services.catalog.can_look_inside,
            elem_id="seen-opener",
        )

    def build_panel(self) -> None:
        """Make the gallery, closed."""
        self.gallery = gr.Gallery(
            label="What the model sees of the last pictures",
            visible=False,
            columns=4,
            fit_columns=False,
            height=330,
            object_fit="contain",
            interactive=False,
            format="png",
            buttons=["fullscreen"],
            elem_id="seen",
        )

    def connect(self, chat: ChatParts, *events: Any) -> None:
        """Draw the gallery when it is opened, and after `events`."""
        self.opener.change(self.show, [self.opener, *chat], [self.gallery], **TELLING)
        for event in events:
            event(self.show, [self.opener, *chat], [self.gallery], **TELLING)

    def show(
        self, is_open: bool, conversation: Conversation, browser: Any, model_id: str | None, request: gr.Request
    ) -> Any:
        """Show the last question's pictures as the model gets them."""
        if not is_open:
            return gr.update(visible=False, value=None)
        try:
            return gr.update(visible=True, value=self._seen(conversation, browser, model_id, request))
        except Exception as error:  # every kind becomes a message
            gr.Warning(as_html(told(error)))
            return gr.update(visible=False, value=None)

    def _seen(
        self, conversation: Conversation, browser: Any, model_id: str | None, request: gr.Request
    ) -> list[tuple[Any, str]]:
        engine = self.services.catalog.engine(model_id)
        if not isinstance(engine, LocalEngine):
            raise UserError("This model runs on another server, which does not tell what it sees.")
        pictures = self.services.visitor(browser, request).pictures
        names = next((message.pictures for message in reversed(conversation.messages) if message.pictures), ())
        self.services.uploads.check_room()
        seen: list[tuple[Any, str]] = []
        for name in names:
            with pictures.decoded(name) as picture:
                seen += [tuple(one) for one in what_the_model_sees(engine.predictor.processor, picture)]
        return seen
