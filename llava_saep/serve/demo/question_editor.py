"""Changing an earlier question. (The pencil of Gradio's chatbot fails for questions with pictures, so it is off.)"""

from typing import Any

import gradio as gr

from llava_saep.serve.demo.conversation import Conversation, shortened
from llava_saep.serve.demo.events import QUIET, TELLING


class QuestionEditor:
    """A panel with the chat's questions, and a field for new words.

    Attributes:
        opener: button that `build_opener` makes.
        place: the chosen question's place in the conversation.
        text: its new words.
        submit: button; whoever builds the panel says what it does.
    """

    def __init__(self, *, max_characters: int):
        self.max_characters = max_characters

    def build_opener(self) -> None:
        """Make the button that opens the panel."""
        self.opener = gr.Button("Edit a question", size="sm", elem_id="edit-opener", min_width=130)

    def build_panel(self, conversation: gr.State) -> None:
        """Make the panel, closed, and connect it."""
        with gr.Column(visible=False, elem_id="edit-panel") as self.panel:
            self.place = gr.Dropdown([], label="Question to change", filterable=False, elem_id="edit-place")
            self.text = gr.Textbox(
                label="Its new words; its pictures stay, and what followed it goes",
                lines=2,
                max_lines=8,
                max_length=self.max_characters,
                elem_id="edit-text",
            )
            with gr.Row():
                self.submit = gr.Button("Ask again from here", variant="primary", size="sm", elem_id="edit-submit")
                self.cancel = gr.Button("Cancel", size="sm", elem_id="edit-cancel")
        self.opener.click(self.open, [conversation], [self.panel, self.place, self.text], **TELLING)
        self.place.input(self.choose, [conversation, self.place], [self.text], **QUIET)
        for button in (self.submit, self.cancel):
            button.click(lambda: gr.update(visible=False), None, [self.panel], **QUIET)

    def open(self, conversation: Conversation) -> list[Any]:
        """Show the last question."""
        questions = [
            (f"{number}. {shortened(message.text) or 'Picture'}", index)
            for number, (index, message) in enumerate(conversation.questions, start=1)
        ]
        if not questions:
            gr.Info("There is no question to change yet.")
            return [gr.update(visible=False), gr.skip(), gr.skip()]
        place = questions[-1][1]
        text = conversation.messages[place].text
        return [gr.update(visible=True), gr.update(choices=questions, value=place), text]

    def choose(self, conversation: Conversation, place: int | None) -> str:
        """Show the chosen question's words."""
        return next((message.text for index, message in conversation.questions if index == place), "")
